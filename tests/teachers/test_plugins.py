"""Finding teachers, trusting files, labelling; needs no extra."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.cli.main import main
from pipeline.datasets import open_dataset
from pipeline.errors import CheckpointError, SpecError
from pipeline.spec.cache_spec import load_spec
from pipeline.spec.sections import TeacherSpec
from pipeline.teachers.irreps import invariants, vectors
from pipeline.teachers.registry import PLUGINS, load_potential, teacher_names
from pipeline.teachers.runner import TeacherRunner
from pipeline.teachers.trust import NUMPY_ARRAYS, refuse_code, weights_sha256
from tests.commands import refusal, run_command
from tests.frames import collision_frames, write_frames
from tests.stores import spec_document, write_spec


def test_unknown_teachers_are_named_with_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"'sevenet'.*nearest known one is 'sevennet'"):
        load_potential(TeacherSpec(model="sevenet"))
    assert {"gemnet_oc", "painn", "schnet", *PLUGINS} <= set(teacher_names())


@pytest.mark.parametrize("name", PLUGINS)
def test_missing_packages_are_named_with_their_extra(name: str) -> None:
    _, package, extra = PLUGINS[name]
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(SpecError, match=rf"'{package}'.*kd-train\[{extra}\]"):
        load_potential(TeacherSpec(model=name))


def test_our_models_need_a_file_and_take_one_option(teacher_file: Path) -> None:
    with pytest.raises(SpecError, match=r"checkpoint is missing"):
        load_potential(TeacherSpec(model="painn"))
    for options, words in (
        ({"a": 1}, "painn has no option 'a'"),
        ({"any_element": 1}, "any_element is 1; set true or false"),
    ):
        spec = TeacherSpec(model="painn", checkpoint=str(teacher_file), options=options)
        with pytest.raises(SpecError, match=words):
            load_potential(spec)


def test_a_spec_without_checkpoint_resolves(tmp_path: Path) -> None:
    data = write_frames(tmp_path / "d.extxyz", collision_frames(2))
    document = spec_document({"train": data}, tmp_path / "s.zarr")
    document["teacher"] = {"model": "sevennet", "options": {"pretrained": "7net-0"}}
    spec = load_spec(write_spec(tmp_path / "s.yaml", document))
    assert spec.teacher is not None
    assert spec.teacher.checkpoint is None


class _Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    torch.save({"config": _Evil(trace), "weights": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="could run code"):
        refuse_code(path, NUMPY_ARRAYS)
    assert not trace.exists()


def test_numbers_in_a_file_are_admitted_and_damage_is_not(tmp_path: Path) -> None:
    path = tmp_path / "good.pt"
    torch.save({"weights": torch.ones(2), "shift": np.arange(3.0)}, path)
    refuse_code(path, NUMPY_ARRAYS)
    with pytest.raises(CheckpointError, match="could run code"):
        refuse_code(path)  # arrays only where they are named harmless
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(CheckpointError, match="incomplete"):
        refuse_code(path, NUMPY_ARRAYS)
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        refuse_code(tmp_path / "none.pt")


def test_hash_of_weights_follows_every_number() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    before = weights_sha256(model)
    assert weights_sha256(model) == before
    with torch.no_grad():
        model.bias[1] += 1e-3
    assert weights_sha256(model) != before


def test_channels_are_taken_by_kind_and_parity() -> None:
    """Columns counted by hand: 2 of 0e, 1 of 0o, 2·3 of 1o, 3 of 1e."""
    irreps = "2x0e+1x0o+2x1o+1x1e"
    state = torch.arange(24.0).reshape(2, 12)
    assert invariants(irreps).of(state).tolist() == [[0, 1], [12, 13]]
    found = vectors(irreps).of(state)
    assert found.shape == (2, 3, 2)
    assert found[0, :, 0].tolist() == [3, 4, 5]
    assert found[0, :, 1].tolist() == [6, 7, 8]
    # Without any odd channel, 1e stands for vectors.
    assert vectors("1x0e+1x1e").of(state)[1, :, 0].tolist() == [13, 14, 15]
    assert vectors("4x0e").count == 0


def test_labels_are_the_teacher_s(tmp_path: Path, teacher_file: Path) -> None:
    data = write_frames(tmp_path / "d.extxyz", collision_frames(5))
    document = spec_document({"train": data}, tmp_path / "s.zarr", teacher_file)
    spec = write_spec(tmp_path / "s.yaml", document)
    done = run_command(main, ["label", spec, "--out", tmp_path / "labels"])
    assert done.exit_code == 0, done.output
    before = open_dataset("extxyz", str(data))
    after = open_dataset("extxyz", str(tmp_path / "labels" / "train.extxyz"))
    samples = [before[number] for number in range(len(before))]
    chosen = load_spec(spec).teacher
    assert chosen is not None
    wanted = TeacherRunner.load(chosen).predict(samples, ())
    assert after.sample_ids == before.sample_ids
    energies = [after[number].energy for number in range(5)]
    assert energies == wanted["teacher_energy"].tolist()
    assert not done.stderr
    text = data.read_text().replace("energy=", "REF_energy=")
    data.write_text(text.replace("forces:R:3", "REF_forces:R:3"))
    done = run_command(main, ["label", spec, "--out", tmp_path / "again"])
    assert done.exit_code == 0, done.output
    first, second = done.stderr.splitlines()
    assert first.startswith("Warning: splits.train: 5 of 5 samples have no energy")
    assert first.endswith("'REF_energy', 'REF_forces'; set splits.train.energy_key")
    assert second.endswith("set splits.train.forces_key")
    forces = np.concatenate([after[number].forces for number in range(5)])
    assert np.array_equal(forces, wanted["teacher_forces"])
    for number, sample in enumerate(samples):
        found = after[number].structure
        assert found.checksum == sample.structure.checksum
        assert np.array_equal(found.tags, sample.structure.tags)
        assert np.array_equal(found.fixed, sample.structure.fixed)


def test_a_teacher_is_checked_from_the_command_line(
    tmp_path: Path, teacher_file: Path
) -> None:
    data = write_frames(tmp_path / "d.extxyz", collision_frames(3))
    document = spec_document({"train": data}, tmp_path / "s.zarr", teacher_file)
    spec = write_spec(tmp_path / "s.yaml", document)
    done = run_command(main, ["check-teacher", spec])
    assert done.exit_code == 0, done.output
    assert "rotation" in done.output
    strict = run_command(main, ["check-teacher", spec, "--tolerance", "1e-12"])
    assert strict.exit_code == 1
    assert "more than 1e-12" in strict.stderr
    del document["teacher"], document["features"]
    plain = write_spec(tmp_path / "plain.yaml", document)
    for command in (["check-teacher", plain], ["label", plain, "--out", tmp_path]):
        assert "no teacher: section" in refusal(main, command)
