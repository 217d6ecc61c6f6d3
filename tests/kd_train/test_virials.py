"""Virials in training: loss, default weight, refusals, metrics and their files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd_train.cli.evaluate import eval_main
from kd_train.cli.report import report_main
from kd_train.config.sections import LossConfig
from kd_train.evaluation.evaluate import teacher_metrics
from kd_train.evaluation.evaluate_student import evaluate_student
from kd_train.evaluation.load_student import load_student
from kd_train.loader.choose_split import choose_split
from kd_train.loader.data import CachedSamples
from kd_train.strategies.losses import (
    OutputError,
    complete_labels,
    joint_mean,
    reference_labels,
    teacher_labels,
    virial_total,
)
from kd_train.trainer.setup import resolve_config
from kd_train.trainer.trainer import Trainer
from pipeline.errors import SpecError
from pipeline.models.normalizer import Normalizer
from pipeline.models.output import ModelOutput
from pipeline.models.zoo import build_model
from pipeline.store.reader import FeatureStore
from tests.commands import run_command
from tests.pipeline.test_virial_store import crystal_document, write_crystals
from tests.stores import STUDENTS, build, train_config, write_spec


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Splits ``train`` of crystals and molecules, ``bare`` without labels' virials."""
    folder = tmp_path_factory.mktemp("virials")
    document = crystal_document(folder)
    section = document["splits"]["train"]
    document["splits"]["bare"] = section | {"virial_key": "none"}
    write_crystals(folder / "mols.extxyz", 0, molecules=3)
    document["splits"]["mols"] = section | {"path": str(folder / "mols.extxyz")}
    return build(write_spec(folder / "spec.yaml", document))


def _config(student: str = "schnet-demo", **changes: Any) -> Any:
    splits = {"train_split": "train", "val_split": "train"}
    short = {"steps": 4, "eval_every": 2, "batch_size": 4}
    return train_config(student, **{**splits, **short, **changes})


def _resolved(store: FeatureStore, **changes: Any) -> Any:
    return resolve_config(_config(**changes), store).loss.virial_weight


def test_the_loss_is_the_frobenius_norm_per_atom_by_hand(store: FeatureStore) -> None:
    rule_of = store.splits["train"]
    samples = CachedSamples(rule_of, _rule(), range(1, 119), ("teacher_energy",))
    batch = samples.batch(np.arange(len(rule_of)))
    batch.teacher_forces = torch.zeros_like(batch.forces)
    units = Normalizer(0.0, 3.0, 3.0)
    output = ModelOutput(
        torch.zeros(8), torch.zeros_like(batch.forces), torch.zeros(1), None, None
    )
    torch.manual_seed(0)
    output.virial = torch.randn(8, 3, 3)
    config = LossConfig(energy_weight=0, force_weight=0, virial_weight=7)
    wanted: dict[str, float] = {}
    ours = output.virial.double().numpy()
    labels, teachers = batch.virial.numpy(), batch.teacher_virial.numpy()
    known = np.isfinite(labels).all(axis=(1, 2))
    assert known.sum() == 5
    sizes = batch.natoms.numpy()

    def errors(targets: np.ndarray) -> np.ndarray:
        return np.linalg.norm(ours - targets / 3.0, axis=(1, 2)) / sizes

    wanted["own"] = 7 * errors(labels)[known].mean()
    wanted["teacher"] = 7 * errors(teachers).mean()
    mixed = np.where(known[:, None, None], labels, teachers)
    weights = np.where(known, 1.0, 0.5)
    wanted["both"] = 7 * (weights * errors(mixed)).sum() / weights.sum()
    makers = {
        "own": reference_labels,
        "teacher": teacher_labels,
        "both": lambda b: complete_labels(b, 0.5),
    }
    for name, maker in makers.items():
        term = OutputError("l0", maker, units, config)
        totals, counts = term.totals(output, batch), term.counts(batch)
        assert len(term.part_weights) == 3
        found = float(joint_mean(term.part_weights, totals, counts))
        assert found == pytest.approx(wanted[name], rel=1e-5)


def _rule() -> Any:
    return build_model("schnet", STUDENTS["schnet-demo"]).graph_rule


def test_gradients_of_missing_virials_are_zero() -> None:
    prediction = torch.randn(3, 3, 3, requires_grad=True)
    label = torch.full((3, 3, 3), float("nan"))
    label[1] = 0.0
    virial_total(prediction, label, torch.tensor([0.0, 2.0, 0.0])).backward()
    assert prediction.grad is not None
    assert prediction.grad[[0, 2]].abs().max() == 0
    assert prediction.grad[1].norm() == pytest.approx(2.0)


def test_the_default_weight_follows_from_split_and_student(store: FeatureStore) -> None:
    assert _resolved(store) == 10.0
    assert _resolved(store, train_split="bare") == 0.0
    assert _resolved(store, student="painn-small-demo") == 0.0
    assert _resolved(store, loss={"virial_weight": 0}) == 0.0
    assert _resolved(store, train_split="train", loss={"virial_weight": 3}) == 3.0
    pseudo = {"pseudo_label_weight": 1}
    assert _resolved(store, train_split="bare", loss=pseudo) == 10.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student": "painn-small-demo"}, "predicts forces directly and has no virial"),
        ({"train_split": "bare"}, "add vanilla1 to the strategy"),
        ({"train_split": "mols"}, "label the samples with stress or virial"),
    ],
)
def test_a_weight_that_nothing_can_learn_from_is_refused(
    store: FeatureStore, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    config = _config(**{"loss": {"virial_weight": 5}, **changes})
    with pytest.raises(SpecError, match=words):
        Trainer(resolve_config(config, store), store, tmp_path / "run")


def test_a_run_learns_virials_and_reports_stress(
    store: FeatureStore, tmp_path: Path
) -> None:
    """The metric against ASE's sign and volume, from the predictions of the run."""
    config = _config(strategy="vanilla1", steps=60, eval_every=20)
    config = resolve_config(config, store)
    Trainer(config, store, tmp_path / "run").train()
    summary = json.loads((tmp_path / "run/metrics.json").read_text())
    found = np.load(tmp_path / "run/predictions.npz")
    periodic = found["volume"] > 0
    assert periodic.sum() == 5
    difference = (found["virial"] - found["virial_label"])[periodic]
    stresses = difference / found["volume"][periodic, None, None]
    six = np.stack([stresses[:, i, j] for i in range(3) for j in range(i, 3)])
    assert summary["metrics"]["stress_mae"] == pytest.approx(1e3 * np.abs(six).mean())
    rows = (tmp_path / "run/metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("val_stress_mae")
    assert float(rows[-1].split(",")[column]) > 0
    again = evaluate_student(tmp_path / "run", store, ["train", "mols"])
    assert again["train"]["stress_mae"] == pytest.approx(
        summary["metrics"]["stress_mae"], rel=1e-5
    )
    assert "stress_mae" not in again["mols"]
    teacher = teacher_metrics(store.splits["train"])
    assert teacher is not None
    assert summary["teacher_metrics"]["stress_mae"] == teacher["stress_mae"]
    _check_report(tmp_path / "run", summary["metrics"]["stress_mae"])
    # The label says minus the slope, and so does the student's own virial.
    student = load_student(tmp_path / "run")
    samples = CachedSamples(
        store.splits["train"], student.model.graph_rule, student.model.elements
    )
    batch = samples.batch(np.arange(8))
    with torch.no_grad():
        output = student.model(batch)
    virial = student.normalizer.denormalize_virial(output.virial.double()).numpy()
    assert np.allclose(found["virial"], virial, rtol=1e-4, atol=1e-4)


def test_joined_splits_may_lack_virials(store: FeatureStore) -> None:
    fields = ("teacher_energy", "teacher_forces")
    split = choose_split(store, "mols+train", fields)
    # The two splits share ids of other structures, so molecules of `mols` come first.
    values = split.read(np.arange(len(split)), ["labels/virial", "teacher/virial"])
    assert np.isfinite(values["labels/virial"]).all(axis=(1, 2)).sum() == 5
    assert np.isnan(values["teacher/virial"][:3]).all()


def _check_report(run: Path, error: float) -> None:
    """The report has a column, a panel and the unit; kd-eval has a column."""
    out = run.parent / "report"
    done = run_command(report_main, [run, "--out", out])
    assert done.exit_code == 0, done.output
    text = next(out.glob("*.txt")).read_text()
    assert "stress MAE" in text
    assert f"{error:.2f}" in text
    assert "1 meV/Å³ is 0.1602 GPa." in text
    table = next(out.glob("*.csv")).read_text().splitlines()
    assert "stress_mae_gap_closed" in table[0].split(",")
    data = run.parents[0] / "cu.extxyz"
    write_crystals(data, 2, molecules=1)
    done = run_command(eval_main, [run, "--data", data, "--any-element"])
    assert done.exit_code == 0, done.output
    assert "S MAE" in done.stdout
    assert "[meV/Å³]" in done.stdout
    hidden = ["--virial-key", "none"]
    done = run_command(eval_main, [run, "--data", data, "--any-element", *hidden])
    assert "S MAE" not in done.stdout
