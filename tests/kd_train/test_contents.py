"""What a run finds in its splits, what the student keeps of it, and who asks later."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule

from kd_train.cli.evaluate import eval_main
from kd_train.cli.train import cka_main, main
from kd_train.config.train_config import TrainConfig
from kd_train.evaluation.calculator import StudentCalculator
from kd_train.trainer.contents import read_contents
from pipeline.models.checkpoint import load_checkpoint
from pipeline.store.reader import FeatureStore
from tests.commands import refusal
from tests.frames import frame, write_frames
from tests.kd_train.runs import make_run
from tests.stores import (
    STUDENTS,
    build,
    save_teacher,
    spec_document,
    train_config,
    write_spec,
)


def waters(
    count: int, first: str = "O", name: str = "w", header: str = ""
) -> list[str]:
    """Frames of rattled water, or of the like with another atom for the oxygen."""
    rng = np.random.default_rng(ord(first[0]))
    places = molecule("H2O").positions
    options: dict[str, Any] = {"header": header} if header else {}
    return [
        frame(
            f"{name}{k}",
            [first, "H", "H"],
            places + 0.05 * rng.normal(size=(3, 3)),
            energy=-100.0 - 0.1 * k,
            forces=rng.normal(size=(3, 3)),
            **options,
        )
        for k in range(count)
    ]


def store_of(folder: Path, **splits: list[str]) -> FeatureStore:
    """Store without a teacher whose splits have these frames."""
    files = {
        name: write_frames(folder / f"{name}.extxyz", frames)
        for name, frames in splits.items()
    }
    document = spec_document(files, folder / "store.zarr")
    return build(write_spec(folder / "spec.yaml", document))


def plain(**changes: Any) -> TrainConfig:
    """A run of two steps without a teacher."""
    return train_config(strategy="none", steps=2, eval_every=2, **changes)


@pytest.fixture(scope="module")
def water(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Store of waters, validated on some with sulphur and selenium in it."""
    others = [*waters(4, name="v"), *waters(2, "S", "s"), *waters(1, "Se", "se")]
    return store_of(tmp_path_factory.mktemp("water"), train=waters(32), val=others)


@pytest.fixture(scope="module")
def student(water: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of waters."""
    folder = tmp_path_factory.mktemp("student")
    make_run(water, folder, plain()).train(resume=False)
    return folder


def test_elements_of_other_splits_are_told(
    water: FeatureStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A8: before the first step, with the samples."""
    caplog.set_level(logging.WARNING, "kd_train")
    told = r"'val' has samples with S, Se \(such as '(s0|s1)', '(s0|s1)', 'se0'\)"
    make_run(water, tmp_path, plain(test_split="val"))
    assert len(re.findall(f"val_split: {told}", caplog.text)) == 1
    assert "test_split: 'val' has samples with" not in caplog.text
    caplog.clear()
    make_run(water, tmp_path, plain(val_split="train", test_split="val"))
    assert re.search(f"test_split: {told}", caplog.text)
    assert not re.search(r"val_split: '\w+' has samples with", caplog.text)


def test_elements_without_a_reference_energy_are_told(
    water: FeatureStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A8: of joined splits the first gives the references."""
    caplog.set_level(logging.WARNING, "kd_train")
    make_run(water, tmp_path, plain(train_split="train+val", val_split="val"))
    told = r"train_split: 'train\+val' has samples with S, Se \(such as 's\d'\)"
    assert re.search(told, caplog.text)
    assert "has samples with S, Se, which" not in caplog.text


def test_a_student_keeps_its_elements_and_what_they_leave_open(student: Path) -> None:
    """A8 and A14: in the file, for all who use it later."""
    about = load_checkpoint(student / "student.safetensors").provenance
    kept = about["training_data"]
    json.dumps(kept)
    assert kept["elements"] == [1, 8]
    (free,) = kept["undetermined"]
    assert 2 * free["1"] + free["8"] == pytest.approx(0, abs=1e-12)
    assert abs(free["1"]) > 0.1


def test_the_calculator_goes_by_what_the_student_keeps(student: Path) -> None:
    """A8 and A14: other elements are refused, other compositions warned of once."""
    calc = StudentCalculator(student, device="cpu")
    water = molecule("H2O")
    water.calc = calc
    water.get_potential_energy()
    four = Atoms(
        "O2H4", np.vstack([water.positions, water.positions + 2])[[0, 3, 1, 2, 4, 5]]
    )
    four.calc = calc
    four.get_potential_energy()
    alone = molecule("H2")
    alone.calc = calc
    told = "do not determine the reference energies of H, and H2 is not a combination"
    with pytest.warns(UserWarning, match=told):
        alone.get_potential_energy()
    alone.positions[0] += 0.01
    alone.get_potential_energy()
    sulphide = molecule("SH2")
    sulphide.calc = calc
    with pytest.raises(Exception, match=r"holds S; .*set any_element=True to go on"):
        sulphide.get_potential_energy()


def test_energies_without_references_list_their_elements_too(tmp_path: Path) -> None:
    """A8: nothing but the list tells which elements were there."""
    store = store_of(tmp_path, train=waters(16), val=waters(4, name="v"))
    config = plain(normalizer="none")
    make_run(store, tmp_path / "run", config).train(resume=False)
    calc = StudentCalculator(tmp_path / "run", device="cpu")
    assert calc.reference_energies() == {}
    atoms = molecule("CH4")
    atoms.calc = calc
    with pytest.raises(Exception, match="holds C; .*held no C"):
        atoms.get_potential_energy()
    # A mean alone leaves nothing open.
    loaded = load_checkpoint(tmp_path / "run" / "student.safetensors")
    assert loaded.provenance["training_data"]["undetermined"] == []


def test_compositions_that_determine_all_leave_nothing_open(tmp_path: Path) -> None:
    """A14: a second composition is enough for two elements."""
    pairs = [
        frame(f"h{k}", ["H", "H"], [[0, 0, 0], [0, 0, 0.7 + k / 20]], energy=-30.0)
        for k in range(3)
    ]
    store = store_of(tmp_path, train=[*waters(12), *pairs], val=waters(4, name="v"))
    found = read_contents(store.splits["train"])
    assert found.elements == [1, 8]
    assert found.undetermined() == []
    assert found.samples[8][0].startswith("w")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_students_that_ignore_images_are_refused(split: str, tmp_path: Path) -> None:
    """A5: whichever split is periodic, and in one direction only."""
    splits = {name: waters(16, name=name) for name in ("train", "val", "test")}
    header = 'pbc="F F T" Lattice="9 0 0 0 9 0 0 0 9"'
    splits[split][7] = waters(1, name="wire", header=header)[0]
    store = store_of(tmp_path, **splits)
    config = tmp_path / "config.yaml"
    sizes = STUDENTS["schnet-demo"]
    student = {"preset": "schnet-demo", "hyperparameters": sizes | {"use_pbc": False}}
    config.write_text(
        json.dumps({"student": student, "steps": 1, "test_split": "test"})
    )
    words = ["--cache", store.path, "--config", config, "--out", tmp_path / "run"]
    told = refusal(main, [*words, "--device", "cpu"])
    assert told.startswith(f"{split}_split: sample 'wire0' of {split!r}")
    assert "student.hyperparameters.use_pbc=true" in told
    assert not (tmp_path / "run").exists()


def test_models_that_ignore_images_are_refused_on_periodic_stores(
    tmp_path: Path,
) -> None:
    """A5: in kd-eval and kd-cka."""
    header = 'pbc="T F T" Lattice="9 0 0 0 9 0 0 0 9"'
    store = store_of(tmp_path, val=waters(3, header=header))
    blind = save_teacher(tmp_path / "blind.safetensors", use_pbc=False)
    given = ["--data", store.path, "--split", "val", "--device", "cpu"]
    out = ["--out", tmp_path / "out"]
    for command, words in (
        (eval_main, [blind, *given]),
        (cka_main, [blind, blind, *given, *out]),
    ):
        told = refusal(command, words)
        assert re.match(r"Sample 'w\d': pbc is T F T, but the graphs of the", told)
        assert "splits.NAME.pbc: none" in told
