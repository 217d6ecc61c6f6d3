"""The teacher's errors on training splits, which stand next to those on test."""

from collections.abc import Sequence

from kd_train.report.documents import Metrics
from kd_train.report.grouping import Cohort
from pipeline.store.teacher_error import unlike_errors


def train_metrics(cohorts: Sequence[Cohort]) -> list[tuple[str, Metrics]]:
    """Return the labelled training splits of the runs with the teacher's errors.

    Runs of earlier versions do not record these errors.
    """
    found: dict[str, Metrics] = {}
    for run in (run for cohort in cohorts for run in cohort.runs):
        training, metrics = run.summary.training, run.summary.teacher_train_metrics
        if training is not None and metrics is not None:
            found.setdefault("+".join(training.labelled_splits), metrics)
    return list(found.items())


def teacher_notes(cohorts: Sequence[Cohort]) -> list[str]:
    """Warn of training splits on which the teacher errs far less, or far more."""
    if not cohorts or (goal := cohorts[0].teacher) is None:
        return []
    first = cohorts[0].runs[0].summary
    test = first.val_split, goal.forces_mae
    notes = [
        unlike_errors((split, metrics.forces_mae), test)
        for split, metrics in train_metrics(cohorts)
        if split != first.val_split
    ]
    return [note for note in notes if note is not None]
