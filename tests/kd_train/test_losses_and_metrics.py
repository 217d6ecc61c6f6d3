"""Losses, metrics, learning rate, evaluation: against loops and hand numbers."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd_train.config.sections import LossConfig
from kd_train.evaluation.evaluate import evaluate, teacher_metrics
from kd_train.evaluation.metrics import MetricSums, gap_closed
from kd_train.loader.data import CachedSamples
from kd_train.loader.sampler import ordered_batches
from kd_train.strategies.losses import (
    energy_total,
    force_l2_total,
    force_mae_total,
    joint_mean,
)
from kd_train.trainer.schedule import learning_rate
from pipeline.datasets import open_dataset
from pipeline.models.checkpoint import load_checkpoint
from pipeline.models.output import ModelOutput
from pipeline.spec.sections import TeacherSpec
from pipeline.store.reader import FeatureStore
from pipeline.structure import Sample
from pipeline.teachers.runner import TeacherRunner
from tests.stores import train_config

SIZES = [3, 1, 4, 2, 5, 2]


def _random_results(seed: int = 7) -> dict[str, torch.Tensor]:
    """Predictions near labels, with fixed atoms and every kind of missing label."""
    generator = np.random.default_rng(seed)
    n, atoms = len(SIZES), sum(SIZES)
    energy = generator.normal(size=n)
    forces = generator.normal(size=(atoms, 3))
    error = np.repeat([0.001, 0.01, 0.1, 0.012, 0.001, 0.001], SIZES)
    predicted = forces + error[:, None] * generator.normal(size=(atoms, 3))
    energy_label = energy + np.array([0.015, -0.3, 0.001, 0.021, -0.019, 0.0])
    energy_label[1] = np.nan
    fixed = np.zeros(atoms, bool)
    fixed[[0, 5, 6]] = True
    fixed[-2:] = True  # the last sample has no free atom
    predicted[0] += 50.0
    forces[9] = [np.nan, 1.0, 2.0]
    return {
        "energy": torch.tensor(energy),
        "forces": torch.tensor(predicted, dtype=torch.float32),
        "energy_label": torch.tensor(energy_label),
        "force_label": torch.tensor(forces, dtype=torch.float32),
        "batch": torch.repeat_interleave(torch.arange(n), torch.tensor(SIZES)),
        "fixed": torch.tensor(fixed),
    }


def _brute_force(results: dict[str, torch.Tensor]) -> dict[str, float]:
    values = {name: tensor.double().numpy() for name, tensor in results.items()}
    energies, components, cosines, within = [], [], [], []
    for sample in range(len(values["energy"])):
        off = abs(values["energy"][sample] - values["energy_label"][sample])
        if not math.isnan(off):
            energies.append(off)
        worst, free = 0.0, 0
        for atom in np.flatnonzero(values["batch"] == sample):
            label, guess = values["force_label"][atom], values["forces"][atom]
            if values["fixed"][atom] or np.isnan(label).any():
                continue
            free += 1
            components += np.abs(guess - label).tolist()
            worst = max(worst, float(np.abs(guess - label).max()))
            lengths = np.linalg.norm(guess) * np.linalg.norm(label)
            cosines.append(float(guess @ label) / lengths)
        if free and not math.isnan(off):
            within.append(off < 0.02 and worst < 0.03)
    return {
        "energy_mae": 1000 * float(np.mean(energies)),
        "forces_mae": 1000 * float(np.mean(components)),
        "forces_cos": float(np.mean(cosines)),
        "efwt": 100 * float(np.mean(within)),
    }


def test_metrics_equal_loops_over_samples_and_atoms() -> None:
    results = _random_results()
    sums = MetricSums()
    sums.add(**results)
    expected = _brute_force(results)
    assert sums.result() == pytest.approx(expected, rel=1e-5)
    # Sample 1 has no energy, 5 no free atom; 0 and one more are within.
    assert sums.counts["efwt"] == 4
    assert 0 < expected["efwt"] < 100


def test_metrics_add_up_over_batches() -> None:
    results = _random_results()
    whole, parts = MetricSums(), MetricSums()
    whole.add(**results)
    atom_cut = sum(SIZES[:2])
    for samples, atoms in (
        (slice(0, 2), slice(0, atom_cut)),
        (slice(2, None), slice(atom_cut, None)),
    ):
        parts.add(
            results["energy"][samples],
            results["forces"][atoms],
            results["energy_label"][samples],
            results["force_label"][atoms],
            results["batch"][atoms] - (0 if atoms.start == 0 else 2),
            results["fixed"][atoms],
        )
    assert parts.counts == whole.counts
    assert parts.result() == pytest.approx(whole.result())


@pytest.mark.parametrize(
    ("energy_error", "force_error", "expected"),
    [
        (0.019, 0.029, 100.0),
        (0.021, 0.029, 0.0),
        (0.019, 0.031, 0.0),
        (-0.019, -0.029, 100.0),
    ],
)
def test_thresholds_of_efwt(
    energy_error: float, force_error: float, expected: float
) -> None:
    sums = MetricSums()
    label = torch.zeros(2, 3)
    forces = label.clone()
    forces[1, 2] = force_error
    sums.add(
        torch.tensor([energy_error]).double(),
        forces,
        torch.zeros(1).double(),
        label,
        torch.zeros(2, dtype=torch.long),
        torch.zeros(2, dtype=torch.bool),
    )
    assert sums.result()["efwt"] == expected


def test_metrics_of_nothing_are_nan() -> None:
    results = _random_results()
    results["energy_label"] = torch.full((len(SIZES),), math.nan)
    results["fixed"] = torch.ones(sum(SIZES), dtype=torch.bool)
    sums = MetricSums()
    sums.add(**results)
    assert all(math.isnan(value) for value in sums.result().values())


def test_gap_closed_reproduces_published_numbers() -> None:
    """arXiv:2306.14818, COLL, PaiNN: energy by vanilla 2, forces by v2v."""
    assert gap_closed(104.0, 86.4, 85.8) == pytest.approx(96.7, abs=0.05)
    assert gap_closed(80.9, 70.4, 64.1) == pytest.approx(62.5, abs=0.05)
    assert gap_closed(10.0, 11.0, 5.0) == pytest.approx(-20.0)


def test_energy_errors_are_summed_by_weight_over_known_labels() -> None:
    guess = torch.tensor([1.0, 2.0, -3.0], requires_grad=True)
    label = torch.tensor([0.5, math.nan, 1.0])
    total = energy_total(guess, label, torch.tensor([1.0, 0.0, 0.25]))
    assert total.item() == pytest.approx(0.5 + 0.25 * 4.0)
    total.backward()
    assert guess.grad is not None
    assert guess.grad.tolist() == [1.0, 0.0, -0.25]


FORCE_LABELS = torch.tensor(
    [[3.0, 4.0, 0.0], [9.0, 9.0, 9.0], [0.0, math.nan, 1.0], [0.0, 0.0, -2.0]]
)


def test_force_errors_are_lengths_summed_by_weight() -> None:
    guess = torch.zeros(4, 3, requires_grad=True)
    total = force_l2_total(guess, FORCE_LABELS, torch.tensor([1.0, 0.0, 0.0, 0.5]))
    assert total.item() == pytest.approx(5.0 + 0.5 * 2.0)
    total.backward()
    assert guess.grad is not None
    expected = [[-0.6, -0.8, 0.0], [0.0] * 3, [0.0] * 3, [0.0, 0.0, 0.5]]
    assert torch.allclose(guess.grad, torch.tensor(expected))


def test_force_errors_may_be_those_of_components() -> None:
    guess = torch.full((4, 3), 0.5, requires_grad=True)
    total = force_mae_total(guess, FORCE_LABELS, torch.tensor([1.0, 0.0, 0.0, 0.5]))
    assert total.item() == pytest.approx(2.5 + 3.5 + 0.5 + 0.5 * (0.5 + 0.5 + 2.5))
    total.backward()
    assert guess.grad is not None
    expected = [[-1.0, -1.0, 1.0], [0.0] * 3, [0.0] * 3, [0.5, 0.5, 0.5]]
    assert torch.allclose(guess.grad, torch.tensor(expected))


def test_losses_without_any_label_are_zero_with_zero_gradient() -> None:
    energy = torch.ones(2, requires_grad=True)
    forces = torch.ones(3, 3, requires_grad=True)
    totals = torch.stack(
        [
            energy_total(energy, torch.full((2,), math.nan), torch.zeros(2)),
            force_l2_total(forces, torch.full((3, 3), math.nan), torch.zeros(3)),
        ]
    )
    loss = joint_mean((1.0, 100.0), totals, torch.zeros(2, dtype=torch.float64))
    loss.backward()
    assert loss.item() == 0
    assert energy.grad is not None
    assert forces.grad is not None
    assert not energy.grad.any()
    assert not forces.grad.any()


def _rate(step: int, **schedule: Any) -> float:
    config = train_config(schedule=schedule, steps=100, optimizer={"lr": 0.5})
    return learning_rate(config, step)


def test_learning_rate_warms_up_then_decays() -> None:
    constant = {"kind": "constant", "warmup_steps": 4}
    rates = [_rate(step, **constant) for step in (0, 1, 3, 4, 90)]
    assert rates == pytest.approx([0.125, 0.25, 0.5, 0.5, 0.5])
    assert _rate(0, kind="constant", warmup_steps=0) == 0.5
    falling = {"kind": "exponential", "decay_rate": 0.01, "decay_steps": 50}
    assert _rate(25, warmup_steps=0, **falling) == pytest.approx(0.05)
    assert _rate(50, warmup_steps=0, **falling) == pytest.approx(0.005)
    assert _rate(4, warmup_steps=10, **falling) == pytest.approx(0.25 * 0.01**0.08)
    cosine = {"kind": "cosine", "warmup_steps": 0}
    assert _rate(0, **cosine) == 0.5
    assert _rate(50, **cosine) == pytest.approx(0.25)
    assert _rate(100, **cosine) == pytest.approx(0.0, abs=1e-12)


@pytest.fixture(scope="module")
def val_sources(datasets: dict[str, Path]) -> dict[str, Sample]:
    dataset = open_dataset("extxyz", str(datasets["val"]))
    return {name: dataset[i] for i, name in enumerate(dataset.sample_ids)}


def _results(
    samples: list[Sample], predictions: dict[str, np.ndarray]
) -> dict[str, torch.Tensor]:
    sizes = torch.tensor([len(s.structure) for s in samples])
    fixed = np.concatenate([s.structure.fixed for s in samples])
    return {
        "energy": torch.from_numpy(predictions["teacher_energy"]),
        "forces": torch.from_numpy(predictions["teacher_forces"]),
        "energy_label": torch.tensor([s.energy for s in samples]),
        "force_label": torch.from_numpy(np.concatenate([s.forces for s in samples])),
        "batch": torch.repeat_interleave(torch.arange(len(samples)), sizes),
        "fixed": torch.from_numpy(fixed),
    }


def test_stored_teacher_is_measured_like_the_live_one(
    small_store: FeatureStore, teacher_file: Path, val_sources: dict[str, Sample]
) -> None:
    split = small_store.splits["val"]
    samples = [val_sources[str(name)] for name in split.sample_ids]
    teacher = TeacherRunner.load(
        TeacherSpec(model="painn", checkpoint=str(teacher_file))
    )
    live = _brute_force(_results(samples, teacher.predict(samples, ())))
    measured = teacher_metrics(split)
    assert measured is not None
    assert measured == pytest.approx(live, rel=1e-4)


def test_labels_have_no_teacher_to_measure(labels_store: FeatureStore) -> None:
    assert teacher_metrics(labels_store.splits["val"]) is None


class _Noting(torch.nn.Module):
    """Passes on to a model and notes whether it was in training mode."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.modes: set[bool] = set()

    def forward(self, batch: Any) -> ModelOutput:
        self.modes |= {self.training, torch.is_grad_enabled()}
        return self.model(batch)


def test_evaluation_equals_predictions_of_single_samples(
    small_store: FeatureStore, teacher_file: Path, val_sources: dict[str, Sample]
) -> None:
    """The teacher's own file as the student, so that Teacher.predict is the truth."""
    loaded = load_checkpoint(teacher_file)
    split = small_store.splits["val"]
    student = _Noting(loaded.model).train()
    samples = CachedSamples(split, loaded.model.graph_rule, loaded.model.elements)
    weights = LossConfig(energy_weight=2.0, force_weight=5.0)
    cpu = torch.device("cpu")
    batches = map(samples.batch, ordered_batches(len(samples), 7))
    result = evaluate(student, batches, loaded.normalizer, weights, cpu)
    assert student.training
    assert student.modes == {False}

    teacher = TeacherRunner.load(
        TeacherSpec(model="painn", checkpoint=str(teacher_file))
    )
    ordered = [val_sources[str(name)] for name in split.sample_ids]
    alone = [teacher.predict([sample], ()) for sample in ordered]
    joined = {key: np.concatenate([a[key] for a in alone]) for key in alone[0]}
    expected = _brute_force(_results(ordered, joined))
    assert result.metrics == pytest.approx(expected, rel=1e-4)
    found = result.predictions
    assert found["energy"] == pytest.approx(joined["teacher_energy"], rel=1e-6)
    assert found["forces"] == pytest.approx(joined["teacher_forces"], abs=1e-4)
    assert found["energy_label"].tolist() == [s.energy for s in ordered]
    assert found["n_atoms"].tolist() == [len(s.structure) for s in ordered]

    units = loaded.normalizer
    energy_part = np.abs(joined["teacher_energy"] - found["energy_label"]).mean()
    lengths = np.linalg.norm(joined["teacher_forces"] - found["forces_label"], axis=1)
    force_part = lengths.mean()
    loss = 2 * energy_part / units.energy_std + 5 * force_part / units.force_std
    assert result.loss == pytest.approx(float(loss), rel=1e-4)
