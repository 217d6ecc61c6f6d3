"""Periodic structures before teachers that ignore it, and cells that cannot be."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cli.main import main
from pipeline.datasets import open_split
from pipeline.spec.sections import SplitSpec, TeacherSpec
from pipeline.store.reader import FeatureStore
from pipeline.teachers.builtin import BuiltinPotential
from pipeline.teachers.potential import SampleGraph
from pipeline.teachers.runner import TeacherRunner
from tests.commands import refusal, run_command
from tests.frames import collision_frames, frame, write_frames
from tests.stores import save_teacher, spec_document, write_spec

ALL, TWO, NONE = "T T T", "T T F", "F F F"
CUBE = "9 0 0 0 9 0 0 0 9"
REMEDY = "use_pbc: true, or set splits.NAME.pbc: none if the structures are molecules"


def boxed(flags: str, cell: str = CUBE) -> str:
    """A frame with these periodic flags."""
    header = f'pbc="{flags}" Lattice="{cell}"'
    return frame("boxed", ["O", "H"], [[0, 0, 0], [0, 0, 1]], energy=-9, header=header)


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that ignores periodic images."""
    path = tmp_path_factory.mktemp("blind") / "blind.safetensors"
    return save_teacher(path, use_pbc=False)


def spec_of(
    folder: Path, bad: str, teacher: Path | None, **split: Any
) -> tuple[Path, Mapping[str, Any]]:
    """Spec of 30 molecules with ``bad`` among them, where the first look is not."""
    frames = collision_frames(30)
    data = write_frames(folder / "data.extxyz", [*frames[:2], bad, *frames[2:]])
    section = {"format": "extxyz", "path": str(data), **split}
    document = spec_document({"train": section}, folder / "store.zarr", teacher)
    return write_spec(folder / "spec.yaml", document), section


@pytest.mark.parametrize("command", ["build", "plan"])
@pytest.mark.parametrize("flags", [ALL, TWO])
def test_a_blind_teacher_is_refused_at_planning(
    command: str, flags: str, blind: Path, tmp_path: Path
) -> None:
    """A5: before anything is written, with the sample and the keys to set."""
    spec, _ = spec_of(tmp_path, boxed(flags), blind)
    told = refusal(main, [command, spec, "--device", "cpu"])
    assert told.startswith(f"Sample 'boxed': pbc is {flags}, but the graphs of the")
    assert REMEDY in told
    assert not (tmp_path / "store.zarr").exists()


def test_a_blind_teacher_is_refused_in_trials_and_labelling(
    blind: Path, tmp_path: Path
) -> None:
    """A5: in check-teacher and label."""
    spec, _ = spec_of(tmp_path, boxed(ALL), blind)
    for command in (
        ["check-teacher", spec, "--samples", 31, "--device", "cpu"],
        ["label", spec, "--out", tmp_path / "labels", "--device", "cpu"],
    ):
        assert REMEDY in refusal(main, command)


def test_a_plug_in_that_makes_its_own_graphs_is_refused(
    blind: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A5: its rule counts, whatever its graphs are."""
    teacher = TeacherRunner.load(TeacherSpec(model="painn", checkpoint=str(blind)))
    _, section = spec_of(tmp_path, boxed(TWO), None)
    sample = open_split(SplitSpec.model_validate(section))[2]

    def careless(self: BuiltinPotential, sample: Any) -> SampleGraph:
        raise AssertionError("no graph is to be made")

    monkeypatch.setattr(BuiltinPotential, "graph", careless)
    with pytest.raises(Exception, match="'boxed': pbc is T T F"):
        teacher.predict([sample], ())


def test_molecules_in_a_box_are_declared(blind: Path, tmp_path: Path) -> None:
    """A5: ``pbc: none`` is the key; the store holds molecules then."""
    spec, section = spec_of(tmp_path, boxed(ALL), blind, pbc="none")
    run = run_command(main, ["build", spec, "--device", "cpu"])
    assert run.exit_code == 0, run.output
    structure = open_split(SplitSpec.model_validate(section))[2].structure
    assert not structure.pbc.any()
    np.testing.assert_array_equal(structure.cell, 9 * np.eye(3))
    split = FeatureStore.open(tmp_path / "store.zarr").splits["train"]
    rows = split.read(np.arange(len(split)), ["structures/pbc"])
    assert not rows["structures/pbc"].any()
    done = run_command(
        main, ["verify", tmp_path / "store.zarr", "--teacher", "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output


def test_bad_samples_may_be_left_out(blind: Path, tmp_path: Path) -> None:
    """A5: like others that the teacher cannot take."""
    spec, _ = spec_of(tmp_path, boxed(ALL), blind, on_bad_sample="skip")
    run = run_command(main, ["build", spec, "--device", "cpu"])
    assert run.exit_code == 0, run.output
    assert "'boxed'" in run.stderr


@pytest.mark.parametrize(
    ("flags", "cell"),
    [
        (ALL, "0 0 0 0 0 0 0 0 0"),
        (TWO, "9 0 0 9 0 0 0 0 9"),
        ("F F T", "9 0 0 0 9 0 0 0 0.1"),
        (ALL, "9 0 0 0 9 0 9 9 0"),
    ],
)
def test_cells_that_cannot_be_are_refused_without_a_teacher(
    flags: str, cell: str, tmp_path: Path
) -> None:
    """A5: a periodic direction without a vector; nothing would notice it later."""
    spec, _ = spec_of(tmp_path, boxed(flags, cell), None)
    told = refusal(main, ["build", spec, "--device", "cpu"])
    assert told.startswith("Sample 'boxed': The cell of a structure of 2 atoms is")
    spec, _ = spec_of(tmp_path, boxed(flags, cell), None, on_bad_sample="skip")
    assert run_command(main, ["build", spec, "--device", "cpu"]).exit_code == 0


@pytest.mark.parametrize(
    ("flags", "cell"), [(NONE, "0 0 0 0 0 0 0 0 0"), ("F F T", "0 0 0 0 0 0 0 0 9")]
)
def test_directions_without_periodicity_need_no_vector(
    flags: str, cell: str, tmp_path: Path
) -> None:
    """A5: only periodic directions are looked at."""
    spec, _ = spec_of(tmp_path, boxed(flags, cell), None)
    assert run_command(main, ["build", spec, "--device", "cpu"]).exit_code == 0
