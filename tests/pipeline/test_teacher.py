"""The teacher: fields in eV and Å equal to the network run on one structure alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.datasets import open_dataset
from pipeline.errors import CheckpointError, DataError, SpecError
from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import neighbor_edges
from pipeline.models.checkpoint import load_checkpoint, save_model
from pipeline.models.zoo import build_model
from pipeline.spec.sections import TeacherSpec
from pipeline.structure import Sample
from pipeline.teachers.runner import TeacherRunner, width_shape
from tests.frames import collision_frames, frame, write_frames
from tests.stores import STUDENTS, save_teacher, teacher_normalizer

FIELDS = ("node_features", "vector_features", "per_atom_energy")


def _spec(path: Path, **changes: object) -> TeacherSpec:
    document = {"model": "painn", "checkpoint": str(path)} | changes
    return TeacherSpec.model_validate(document)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    path = tmp_path_factory.mktemp("d") / "d.extxyz"
    dataset = open_dataset("extxyz", str(write_frames(path, collision_frames(12))))
    return [dataset[i] for i in range(12)]


def _sample(tmp_path: Path, text: str) -> Sample:
    return open_dataset("extxyz", str(write_frames(tmp_path / "d.extxyz", [text])))[0]


def test_predictions_equal_single_forward_passes(
    teacher_file: Path, samples: list[Sample]
) -> None:
    """Units worked out by hand from the normaliser's numbers."""
    found = TeacherRunner.load(_spec(teacher_file, batch_atoms=50)).predict(
        samples, FIELDS
    )
    assert set(found) == {"teacher_energy", "teacher_forces", *FIELDS}
    model = load_checkpoint(teacher_file).model
    units = teacher_normalizer()
    row = 0
    for number, sample in enumerate(samples):
        structure = sample.structure
        edges = neighbor_edges(structure, model.graph_rule)
        with torch.no_grad():
            output = model(collate([structure], [edges]))
        rows = slice(row, row + len(structure))
        row += len(structure)
        references = sum(units.element_references[z] for z in structure.atomic_numbers)
        energy = output.energy.item() * 3.0 - 2.5 + references
        assert found["teacher_energy"][number] == pytest.approx(energy, abs=1e-4)
        for name, expected in (
            ("teacher_forces", output.forces * 1.7),
            ("per_atom_energy", output.per_atom_energy * 3.0),
            ("node_features", output.node_features),
            ("vector_features", output.vector_features),
        ):
            assert np.allclose(found[name][rows], expected.numpy(), atol=2e-5), name
    assert row == len(found["node_features"])
    assert found["node_features"].shape == (row, 16)
    assert found["vector_features"].shape == (row, 3, 16)


def test_atom_energies_add_up_to_the_energy(
    teacher_file: Path, samples: list[Sample]
) -> None:
    teacher = TeacherRunner.load(_spec(teacher_file))
    found = teacher.predict(samples, ("per_atom_energy",))
    units = teacher_normalizer()
    ends = np.cumsum([len(s.structure) for s in samples])
    for number, part in enumerate(np.split(found["per_atom_energy"], ends[:-1])):
        numbers = samples[number].structure.atomic_numbers
        rest = units.energy_mean + sum(units.element_references[z] for z in numbers)
        total = float(part.astype(np.float64).sum()) + rest
        assert found["teacher_energy"][number] == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_batches_do_not_change_numbers_or_order(
    budget: int, teacher_file: Path, samples: list[Sample]
) -> None:
    reference = TeacherRunner.load(_spec(teacher_file)).predict(samples, FIELDS)
    teacher = TeacherRunner.load(_spec(teacher_file, batch_atoms=budget))
    sizes: list[int] = []

    def noted(module: torch.nn.Module, inputs: tuple) -> None:
        sizes.append(len(inputs[0].positions))

    teacher.potential.loaded.model.register_forward_pre_hook(noted)
    found = teacher.predict(samples, FIELDS)
    for name, values in reference.items():
        assert np.allclose(found[name], values, atol=2e-5), name
    largest = max(len(s.structure) for s in samples)
    assert max(sizes) <= max(budget, largest)
    assert sum(sizes) == sum(len(s.structure) for s in samples)
    assert len(sizes) == {1: 12, 10_000: 1}.get(budget, len(sizes))


def test_teacher_is_frozen_and_in_evaluation_mode(teacher_file: Path) -> None:
    model = TeacherRunner.load(_spec(teacher_file)).potential.loaded.model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_widths_and_shapes_follow_from_the_model(teacher_file: Path) -> None:
    teacher = TeacherRunner.load(_spec(teacher_file))
    assert teacher.widths == {
        "per_atom_energy": 0,
        "node_features": 16,
        "vector_features": 16,
    }
    assert width_shape("vector_features", 16) == (3, 16)
    assert width_shape("node_features", 16) == (16,)
    assert width_shape("per_atom_energy", 0) == ()
    teacher.check_fields(FIELDS)
    with pytest.raises(SpecError, match=r"'edge_features'.*node_features"):
        teacher.check_fields(("edge_features",))


def test_identity_changes_with_everything_that_decides_numbers(
    teacher_file: Path, tmp_path: Path
) -> None:
    first = TeacherRunner.load(_spec(teacher_file)).identity
    assert first == TeacherRunner.load(_spec(teacher_file)).identity
    other_weights = save_teacher(tmp_path / "a.safetensors", seed=4)
    other_cutoff = save_teacher(tmp_path / "b.safetensors", cutoff=4.5)
    others = [
        TeacherRunner.load(_spec(other_weights)).identity,
        TeacherRunner.load(_spec(other_cutoff)).identity,
        TeacherRunner.load(_spec(teacher_file, batch_atoms=99)).identity,
    ]
    assert all(other != first for other in others)
    loaded = load_checkpoint(teacher_file)
    units = replace(loaded.normalizer, force_std=2.0)
    path = tmp_path / "c.safetensors"
    save_model(path, "painn", loaded.model, units, {})
    assert TeacherRunner.load(_spec(path)).identity != first


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "schnet.safetensors"
    model = build_model("schnet", STUDENTS["schnet-demo"])
    save_model(path, "schnet", model, teacher_normalizer(), {})
    with pytest.raises(CheckpointError, match=r"holds a schnet.*teacher.model=schnet"):
        TeacherRunner.load(_spec(path))


def test_model_without_forces_is_refused(tmp_path: Path) -> None:
    path = save_teacher(tmp_path / "teacher.safetensors", regress_forces=False)
    with pytest.raises(CheckpointError, match="holds a model without forces"):
        TeacherRunner.load(_spec(path))


def test_schnet_teaches_too(tmp_path: Path, samples: list[Sample]) -> None:
    path = tmp_path / "schnet.safetensors"
    model = build_model("schnet", STUDENTS["schnet-demo"])
    save_model(path, "schnet", model, teacher_normalizer(), {})
    teacher = TeacherRunner.load(_spec(path, model="schnet"))
    found = teacher.predict(samples, ("node_features",))
    assert found["node_features"].shape[1] == 8
    # Forces are the gradient: a small move changes the energy by -F dx.
    sample = samples[0]
    step = 1e-2
    energies = []
    for sign in (-1, 1):
        positions = sample.structure.positions.copy()
        positions[0, 0] += sign * step
        moved = replace(sample.structure, positions=positions)
        moved_sample = replace(sample, structure=moved)
        energies.append(teacher.predict([moved_sample], ())["teacher_energy"][0])
    slope = (energies[1] - energies[0]) / (2 * step) / 3.0 * 1.7
    assert found["teacher_forces"][0, 0] == pytest.approx(-slope, abs=5e-3)


def test_sample_without_neighbours_is_named(teacher_file: Path, tmp_path: Path) -> None:
    lonely = _sample(tmp_path, frame("lonely", ["H", "H"], [[0, 0, 0], [9, 0, 0]]))
    with pytest.raises(DataError, match="'lonely' has no neighbours within 5"):
        TeacherRunner.load(_spec(teacher_file)).predict([lonely], ())


def test_unknown_element_is_named(tmp_path: Path, teacher_file: Path) -> None:
    heavy = _sample(tmp_path, frame("heavy", ["H", "U"], [[0, 0, 0], [1, 0, 0]]))
    with pytest.raises(DataError, match=r"'heavy'.*atomic number 92"):
        TeacherRunner.load(_spec(teacher_file)).predict([heavy], ())


def test_impossible_cell_is_named(tmp_path: Path, teacher_file: Path) -> None:
    flat = _sample(
        tmp_path,
        frame(
            "flat",
            ["H", "O"],
            [[0, 0, 0], [1, 0, 0]],
            header='pbc="T T T" Lattice="3 0 0 3 0 0 0 0 3"',
        ),
    )
    with pytest.raises(DataError, match="'flat'"):
        TeacherRunner.load(_spec(teacher_file)).predict([flat], ())
