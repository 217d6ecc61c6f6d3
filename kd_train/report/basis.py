"""The basis of a row: training samples, passes of the teacher, and cost of a step."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, nan

from kd_train.report.grouping import Cohort, Variant
from kd_train.report.runs import FinishedRun

MISSING = "–"


@dataclass(frozen=True)
class Basis:
    """Training splits of a row and the price of its numbers, None if not recorded.

    ``teacher_passes`` are forward passes of single structures in stage one. ``cost`` is
    the time of a step relative to the baseline's, NaN without one.
    """

    splits: str
    samples: int | None = None
    labelled: int | None = None
    teacher_passes: int | None = None
    cost: float = nan


@dataclass(frozen=True)
class BasisColumn:
    """A column of the table of bases: its name in CSV, its title and its text."""

    name: str
    title: str
    text: Callable[[Basis], str]


BASIS_COLUMNS = (
    BasisColumn("train_split", "trained on", lambda basis: basis.splits),
    BasisColumn("train_samples", "samples", lambda basis: _count(basis.samples)),
    BasisColumn("train_labelled", "labelled", lambda basis: _count(basis.labelled)),
    BasisColumn(
        "teacher_passes", "teacher passes", lambda basis: _count(basis.teacher_passes)
    ),
    BasisColumn("cost_per_step", "cost per step", lambda basis: _factor(basis.cost)),
)


def find_basis(cohort: Cohort, variant: Variant) -> Basis:
    """Return the basis of a row, with what the folders of its runs record."""
    splits = str(variant.runs[0].settings["train_split"])
    cost, training = _relative_cost(cohort, variant), variant.training
    if training is None:
        return Basis(splits, cost=cost)
    counts = training.samples, training.labelled, training.teacher_passes
    return Basis(splits, *counts, cost)


def basis_digits(basis: Basis | None) -> list[str]:
    """Return the cells of a row for CSV, empty if a number is missing."""
    if basis is None:
        return [""] * len(BASIS_COLUMNS)
    numbers = (basis.samples, basis.labelled, basis.teacher_passes)
    counts = ["" if number is None else str(number) for number in numbers]
    return [basis.splits, *counts, repr(basis.cost) if isfinite(basis.cost) else ""]


def _relative_cost(cohort: Cohort, variant: Variant) -> float:
    """Divide the time of a step by that of the baselines, over seeds that have one.

    Times of different numbers of processes are not compared.
    """
    pairs = [
        (run, plain)
        for run in variant.runs
        if (plain := cohort.baseline_of(run)) is not None
        and plain.header.processes == run.header.processes
    ]
    own = sum(_step_seconds(run) for run, _ in pairs)
    other = sum(_step_seconds(plain) for _, plain in pairs)
    return own / other if other > 0 else nan


def _step_seconds(run: FinishedRun) -> float:
    return run.summary.seconds / max(run.summary.steps, 1)


def _count(number: int | None) -> str:
    return MISSING if number is None else f"{number:,}"


def _factor(value: float) -> str:
    return f"{value:.2f}" if isfinite(value) else MISSING
