"""What planning warns of: compositions, the neighbour limit, a teacher's elements."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.cli.main import main
from pipeline.datasets.label_statistics import LabelSums
from pipeline.models.checkpoint import save_model
from pipeline.models.normalizer import Normalizer
from pipeline.models.zoo import build_model
from pipeline.structure import Sample, Structure
from tests.commands import refusal, run_command
from tests.frames import collision_frames, frame, write_frames
from tests.stores import TINY_PAINN, save_teacher, spec_document, write_spec

OPEN = "do not determine the reference energies of"


def water(k: int) -> str:
    """Water, stretched a little."""
    places = [[0, 0, 0], [0.9 + k / 100, 0, 0], [0, 0.9, 0]]
    return frame(f"w{k}", ["O", "H", "H"], places, energy=-2000.0 - k / 100)


def hydrogen(k: int) -> str:
    """A hydrogen molecule, stretched a little."""
    places = [[0, 0, 0], [0.7 + k / 100, 0, 0]]
    return frame(f"h{k}", ["H", "H"], places, energy=-30.0 - k / 100)


def planned(
    folder: Path, splits: dict[str, Sequence[str]], **changes: Any
) -> tuple[str, str]:
    """What ``plan`` writes to standard error and to the log of the store."""
    sections = {}
    for name, frames in splits.items():
        data = write_frames(folder / f"{name}.extxyz", frames)
        sections[name] = {"format": "extxyz", "path": str(data), **changes}
    spec = write_spec(
        folder / "spec.yaml", spec_document(sections, folder / "store.zarr")
    )
    done = run_command(main, ["plan", spec, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    return done.stderr, (folder / "store.zarr.log").read_text()


def test_one_composition_is_told(tmp_path: Path) -> None:
    """A14: one line for all splits, with the elements, on stderr and in the log."""
    waters = [water(k) for k in range(9)]
    said, log = planned(tmp_path, {"train": waters, "val": waters[:3]})
    told = f"splits.train, splits.val: the compositions of the samples {OPEN} H, O"
    assert f"Warning: {told}" in said
    assert said.count(OPEN) == log.count(OPEN) == 1


@pytest.mark.parametrize("frames", [1, 4])
def test_a_smaller_split_need_not_determine_them(frames: int, tmp_path: Path) -> None:
    """A14: what a larger one determines is not open."""
    train = [*map(water, range(8)), hydrogen(0)]
    said, _ = planned(tmp_path, {"train": train, "val": train[:frames]})
    assert OPEN not in said


def test_given_references_are_determined(tmp_path: Path) -> None:
    """A14: and so are energies without any."""
    file = tmp_path / "e0.json"
    file.write_text(json.dumps({"H": -13.6, "O": -2040.0}))
    waters = [water(k) for k in range(4)]
    for choice in (str(file), "none"):
        folder = tmp_path / Path(choice).stem
        folder.mkdir()
        said, _ = planned(folder, {"train": waters}, reference_energies=choice)
        assert OPEN not in said


def _labelled(numbers: Sequence[int]) -> Sample:
    n = len(numbers)
    structure = Structure(
        np.array(numbers, np.uint8),
        np.zeros((n, 3)),
        np.zeros((3, 3)),
        np.zeros(3, bool),
        np.zeros(n, np.int8),
        np.zeros(n, bool),
    )
    return Sample("x", structure, -1.0 * n, np.zeros((n, 3), np.float32))


@pytest.mark.parametrize(
    ("compositions", "undetermined"),
    [
        ([], ()),
        ([[14] * 8], ()),
        ([[1, 1, 8]], (1, 8)),
        # Alcohols: CH2 is known, as is O with two H, and C is not.
        ([[6, 1, 1, 1, 1, 8], [6, 6, *[1] * 6, 8]], (1, 6, 8)),
        # Salt in silicon: Na and Cl always come together.
        ([[14] * 4, [14, 11, 17], [14, 14, 11, 17]], (11, 17)),
        ([[1], [8], [1, 1, 8]], ()),
    ],
)
def test_elements_that_are_not_determined_are_named(
    compositions: list[list[int]], undetermined: tuple[int, ...]
) -> None:
    """A14: those of every combination that no composition notices."""
    sums = LabelSums()
    sums.add([_labelled(numbers) for numbers in compositions for _ in range(70)])
    parts = LabelSums()
    for numbers in compositions:
        part = LabelSums()
        part.add([_labelled(numbers)])
        parts.merge(part)
    assert sums.undetermined == parts.undetermined == undetermined


def test_the_share_of_crowded_atoms_is_told(tmp_path: Path) -> None:
    """A11: of the samples that planning looks at, and of a teacher with a limit."""
    lattice = 'pbc="T T T" Lattice="2.8 0 0 0 2.8 0 0 0 2.8"'
    places = [[0, 0, 0], [1.4, 1.4, 1.4]]
    crystal = frame("cell", ["C", "C"], places, energy=-100.0, header=lattice)
    apart = frame("pair", ["C", "C"], [[0, 0, 0], [0, 0, 1.4]], energy=-100.0)
    data = write_frames(tmp_path / "data.extxyz", [crystal, apart])
    for limit, told in ((20, True), (1000, False)):
        teacher = save_teacher(tmp_path / f"{limit}.safetensors", max_neighbors=limit)
        document = spec_document({"train": data}, tmp_path / f"{limit}.zarr", teacher)
        spec = write_spec(tmp_path / f"{limit}.yaml", document)
        done = run_command(main, ["build", spec, "--device", "cpu"])
        assert done.exit_code == 0
        sentence = "Warning: splits.train: 50 % of 4 atoms have more than 20 neighbours"
        assert (sentence in done.stderr) is told


def _teacher(path: Path, references: dict[int, float], about: dict[str, Any]) -> Path:
    energies = tuple(references.get(z, 0.0) for z in range(119))
    torch.manual_seed(3)
    model = build_model("painn", TINY_PAINN)
    save_model(path, "painn", model, Normalizer(element_references=energies), about)
    return path


@pytest.mark.parametrize(
    ("references", "about"),
    [
        ({1: -13.6, 6: -1030.0}, {}),
        ({}, {"training_data": {"elements": [1, 6], "undetermined": []}}),
        # The list is right where references come from elsewhere.
        (
            {1: -13.6, 6: -1030.0, 8: -2040.0},
            {"training_data": {"elements": [1, 6], "undetermined": []}},
        ),
    ],
)
def test_elements_that_a_teacher_lacks_are_refused(
    references: dict[int, float], about: dict[str, Any], tmp_path: Path
) -> None:
    """A8: by its list of elements or else its references, at planning."""
    teacher = _teacher(tmp_path / "t.safetensors", references, about)
    data = write_frames(tmp_path / "data.extxyz", collision_frames(24))
    document = spec_document({"train": data}, tmp_path / "s.zarr", teacher)
    spec = write_spec(tmp_path / "s.yaml", document)
    commands = (
        ["build", spec],
        ["plan", spec],
        ["check-teacher", spec, "--samples", 24],
        ["label", spec, "--out", tmp_path / "labels"],
    )
    for command in commands:
        told = refusal(main, [*command, "--device", "cpu"])
        assert "holds O; the data that this model was trained on held no O" in told
        assert "set teacher.options.any_element=true to go on" in told
    allowed = ["--set", "teacher.options.any_element=true", "--device", "cpu"]
    assert run_command(main, ["build", spec, *allowed]).exit_code == 0
    store = tmp_path / "s.zarr"
    words = ["verify", store, "--teacher", "--device", "cpu"]
    assert run_command(main, words).exit_code == 0


def test_a_teacher_that_lists_nothing_takes_what_it_can_embed(tmp_path: Path) -> None:
    """A8: as before."""
    teacher = _teacher(tmp_path / "t.safetensors", {}, {})
    data = write_frames(tmp_path / "data.extxyz", collision_frames(8))
    document = spec_document({"train": data}, tmp_path / "s.zarr", teacher)
    spec = write_spec(tmp_path / "s.yaml", document)
    assert run_command(main, ["build", spec, "--device", "cpu"]).exit_code == 0
