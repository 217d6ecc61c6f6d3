"""Which validation is the best one, and when a run has had enough."""

import json
import math
from pathlib import Path

import pytest

from kd_train.evaluation.evaluate import Evaluation
from kd_train.trainer.progress import TrainingState, is_better
from kd_train.trainer.trainer import Trainer
from pipeline.models.checkpoint import load_checkpoint
from pipeline.store.reader import FeatureStore
from tests.kd_train.runs import make_run, metric_rows
from tests.stores import train_config

NAN = math.nan


@pytest.mark.parametrize(
    ("value", "best", "lower_wins", "larger_wins"),
    [
        (1.0, 2.0, True, False),
        (2.0, 1.0, False, True),
        (1.0, 1.0, False, False),
        (NAN, 1.0, False, False),
        (1.0, NAN, True, True),
        (NAN, NAN, False, False),
    ],
)
def test_better_depends_on_the_metric_and_nan_never_is(
    value: float, best: float, lower_wins: bool, larger_wins: bool
) -> None:
    for name in ("loss", "energy_mae", "forces_mae"):
        assert is_better(value, best, name) == lower_wins
    for name in ("forces_cos", "efwt"):
        assert is_better(value, best, name) == larger_wins


def test_weights_are_kept_while_no_validation_has_a_number() -> None:
    progress = TrainingState()
    assert [progress.note(NAN, "loss") for _ in range(2)] == [True, True]
    assert progress.note(3.0, "loss")
    assert not progress.note(NAN, "loss")
    assert not progress.note(3.5, "loss")
    assert progress.since_best == 2
    assert progress.note(2.0, "loss")
    assert (progress.best, progress.since_best) == (2.0, 0)


def _scripted(run: Trainer, values: list[float], metric: str) -> None:
    """Let validations of ``run`` have these ``values``, one after the other."""
    validator, left = run.validator, iter(values)
    evaluate = type(validator).__call__

    class Scripted(type(validator)):  # type: ignore[misc]
        def __call__(self, student: object) -> Evaluation:
            found = evaluate(self, student)  # type: ignore[arg-type]
            metrics = found.metrics | {metric: next(left, 0.0)}
            return Evaluation(metrics, found.loss, found.predictions)

    validator.__class__ = Scripted


def test_run_stops_after_its_patience_and_stays_stopped(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    config = train_config(
        steps=20, eval_every=2, monitor="forces_cos", patience=3, batch_size=4
    )
    run = make_run(small_store, tmp_path, config)
    _scripted(run, [0.1, 0.3, NAN, 0.2, 0.3, 0.9], "forces_cos")
    run.train(resume=False)
    assert [row["step"] for row in metric_rows(tmp_path)] == ["2", "4", "6", "8", "10"]
    exported = tmp_path / "student.safetensors"
    assert load_checkpoint(exported).provenance["step"] == 4
    summary = json.loads((tmp_path / "metrics.json").read_text())
    assert (summary["steps"], summary["stopped_early"]) == (10, True)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    again = make_run(small_store, tmp_path, config)
    again.train(resume=True)
    assert again.progress.step == 10
    for name in ("student.safetensors", "last.pt", "metrics.csv", "predictions.npz"):
        assert (tmp_path / name).read_bytes() == before[name], name


def test_patience_survives_a_resume(small_store: FeatureStore, tmp_path: Path) -> None:
    config = train_config(steps=8, eval_every=2, monitor="efwt", patience=2)
    run = make_run(small_store, tmp_path, config)
    _scripted(run, [0.5, 0.4], "efwt")
    step = run.step

    def stopping(*batches: object) -> object:
        if run.progress.step == 5:
            raise KeyboardInterrupt
        return step(*batches)  # type: ignore[arg-type]

    run.step = stopping  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        run.train(resume=False)
    resumed = make_run(small_store, tmp_path, config)
    _scripted(resumed, [0.5, 0.6], "efwt")
    resumed.train(resume=True)
    assert resumed.progress.step == 6
    assert resumed.progress.best == 0.5
