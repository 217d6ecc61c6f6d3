"""Losses of several batches add up to that of the joint batch; gaps in labels."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from kd_train.config.sections import LossConfig
from kd_train.strategies.losses import (
    Labels,
    OutputError,
    complete_labels,
    reference_labels,
    teacher_labels,
)
from kd_train.trainer.setup import make_learner
from pipeline.errors import SpecError
from pipeline.models.output import ModelOutput
from pipeline.store.reader import FeatureStore
from tests.frames import frame, write_frames
from tests.kd_train.runs import make_run
from tests.stores import (
    build,
    save_teacher,
    spec_document,
    teacher_normalizer,
    train_config,
    write_spec,
)

ATOMS = (2, 3, 1)
FIXED = [4]


def _case() -> tuple[ModelOutput, Data]:
    """Sample 0 has both labels, 1 only forces (one atom lacks them), 2 neither."""
    generator = np.random.default_rng(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.from_numpy(generator.normal(size=shape)).float()

    n = sum(ATOMS)
    energy, forces = random(3).double() - 200, random(n, 3)
    energy[1:] = math.nan
    forces[3, 1] = math.nan
    forces[5] = math.nan
    fixed = torch.zeros(n, dtype=torch.bool)
    fixed[FIXED] = True
    batch = Data(
        atomic_numbers=torch.tensor([6, 1, 8, 1, 1, 6]),
        batch=torch.repeat_interleave(torch.arange(3), torch.tensor(ATOMS)),
        fixed=fixed,
        num_nodes=n,
        energy=energy,
        forces=forces,
        teacher_energy=random(3).double() - 150,
        teacher_forces=random(n, 3),
    )
    output = ModelOutput(random(3), random(n, 3), random(n), random(n, 4), None)
    return output, batch


def _brute(output: ModelOutput, batch: Data, weight: float, error: str) -> float:
    """L0 by loops, ``weight`` for what only the teacher labelled."""
    units, first = teacher_normalizer(), 0
    numbers = batch.atomic_numbers.tolist()
    energies, forces, ends = [], [], np.cumsum(ATOMS).tolist()
    for sample, end in enumerate(ends):
        mine = numbers[first:end]
        offset = units.energy_mean + sum(units.element_references[z] for z in mine)
        label, share = float(batch.energy[sample]), 1.0
        if math.isnan(label):
            label, share = float(batch.teacher_energy[sample]), weight
        target = (label - offset) / units.energy_std
        energies.append((share, abs(float(output.energy[sample]) - target)))
        first = end
    for atom in range(len(numbers)):
        if atom in FIXED:
            continue
        label, share = batch.forces[atom].numpy(), 1.0
        if np.isnan(label).any():
            label, share = batch.teacher_forces[atom].numpy(), weight
        assert output.forces is not None
        off = output.forces[atom].numpy() - label / units.force_std
        if error == "l2":
            forces.append((share, float(np.linalg.norm(off))))
        else:
            forces += [(share, abs(float(value))) for value in off]
    means = [
        sum(w * e for w, e in part if w) / sum(w for w, _ in part)
        for part in (energies, forces)
    ]
    return 2.0 * means[0] + 30.0 * means[1]


@pytest.mark.parametrize("error", ["l2", "mae"])
@pytest.mark.parametrize("weight", [0.0, 0.25, 3.0])
def test_l0_with_labels_of_the_teacher_equals_loops(weight: float, error: str) -> None:
    output, batch = _case()
    config = LossConfig.model_validate(
        {"energy_weight": 2.0, "force_weight": 30.0, "force_loss": error}
    )

    def labels(batch: Data) -> Labels:
        return complete_labels(batch, weight) if weight else reference_labels(batch)

    term = OutputError("l0", labels, teacher_normalizer(), config)
    totals, counts = term.totals(output, batch), term.counts(batch)
    loss = sum(
        w * float(t) / float(c)
        for w, t, c in zip(term.part_weights, totals, counts, strict=True)
    )
    assert loss == pytest.approx(_brute(output, batch, weight, error), rel=1e-5)
    components = 3 if error == "mae" else 1
    assert counts.tolist() == [1 + 2 * weight, components * (3 + 2 * weight)]


def test_labels_that_neither_has_count_nothing() -> None:
    _, batch = _case()
    batch.teacher_energy[1] = math.nan
    batch.teacher_forces[5, 0] = math.inf
    labels = complete_labels(batch, 0.5)
    assert labels.energy_weight.tolist() == [1.0, 0.0, 0.5]
    assert labels.force_weight.tolist() == [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert teacher_labels(batch).energy_weight.tolist() == [1.0, 0.0, 1.0]


@pytest.fixture(scope="module")
def partly_labelled(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Twelve molecules of one to five bonds: a third has both labels, the energy, none.

    The first batch of four below holds no force label at all.
    """
    folder = tmp_path_factory.mktemp("partly")
    generator = np.random.default_rng(8)
    frames = []
    for number in range(12):
        atoms = 2 + (number * 7) % 5
        places = np.arange(atoms)[:, None] * [1.2, 0.1, 0.0]
        places = places + 0.1 * generator.normal(size=(atoms, 3))
        known: dict[str, Any] = {}
        if number % 3:
            known["energy"] = -30.0 * atoms + generator.normal()
        if number % 3 == 1:
            known["forces"] = generator.normal(size=(atoms, 3)).tolist()
        names = ["C", "H", "O", "H", "C", "H"][:atoms]
        frames.append(frame(str(number), names, places.tolist(), **known))
    data = write_frames(folder / "d.extxyz", frames)
    teacher = save_teacher(folder / "teacher.safetensors")
    document = spec_document({"train": data, "val": data}, folder / "s.zarr", teacher)
    return build(write_spec(folder / "s.yaml", document))


def test_a_step_on_several_batches_is_one_on_the_joint_batch(
    partly_labelled: FeatureStore, tmp_path: Path
) -> None:
    """Also where batches differ in labels and sizes, so that means of means differ."""
    config = train_config(
        strategy="n2n+v2v+vanilla1+vanilla2",
        loss={"pseudo_label_weight": 0.5, "force_loss": "mae"},
        optimizer={"clip_norm": None},
    )
    joint, parted = (make_run(partly_labelled, tmp_path, config) for _ in range(2))
    pieces = [np.arange(0, 1), np.arange(1, 8), np.arange(8, 12)]
    whole = joint.step(joint.on_device(joint.train_samples.batch(np.arange(12))))
    parts = parted.step(
        *(parted.on_device(parted.train_samples.batch(piece)) for piece in pieces)
    )
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-5), name
    fresh = make_run(partly_labelled, tmp_path, config)
    alone = [fresh.losses(fresh.train_samples.batch(piece))["l0"] for piece in pieces]
    mean_of_means = sum(value.item() for value in alone) / len(alone)
    assert mean_of_means != pytest.approx(whole["l0"].item(), rel=1e-2)
    learned = dict(parted.modules.named_parameters())
    for name, parameter in joint.modules.named_parameters():
        if parameter.requires_grad:
            left, right = parameter.grad, learned[name].grad
            assert left is not None
            assert right is not None
            size = left.abs().max().item()
            assert torch.allclose(left, right, atol=1e-5 * size), name


def test_validation_knows_no_label_of_the_teacher(
    partly_labelled: FeatureStore, tmp_path: Path
) -> None:
    rows = []
    for weight in (0.0, 5.0):
        run = make_run(
            partly_labelled,
            tmp_path,
            train_config(loss={"pseudo_label_weight": weight}),
        )
        rows.append(run.validator(run.learner.student))
    assert rows[0].loss == rows[1].loss
    assert rows[0].metrics == rows[1].metrics


def test_labels_of_a_teacher_need_one(labels_store: FeatureStore) -> None:
    config = train_config(loss={"pseudo_label_weight": 0.1})
    with pytest.raises(
        SpecError, match=r"loss\.pseudo_label_weight needs .*teacher_energy"
    ):
        make_learner(config, labels_store)
