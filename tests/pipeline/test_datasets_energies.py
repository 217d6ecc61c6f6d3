"""Reference energies from files, and splits whose energies are of different kinds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.build.build import make_build_plan
from pipeline.datasets import open_dataset
from pipeline.datasets.label_statistics import find_differing_kinds
from pipeline.errors import DataError, SpecError
from pipeline.spec.cache_spec import CacheSpec, load_spec, read_reference_energies
from pipeline.structure import Sample
from tests.frames import frame, write_frames
from tests.labels import label_statistics
from tests.pipeline.oc20_files import data_folder


def _water(count: int, per_atom: float, first: int = 0) -> list[str]:
    """Frames of water with energies around so many eV per atom."""
    positions = [[0, 0, 0], [0, 0, 1], [0, 1, 0]]
    return [
        frame(f"w{i}", list("OHH"), positions, energy=3 * per_atom + 0.01 * i)
        for i in range(first, first + count)
    ]


def _dataset(path: Path, frames: list[str]) -> Any:
    return open_dataset("extxyz", str(write_frames(path, frames)))


def _spec(folder: Path, **splits: dict[str, Any]) -> CacheSpec:
    path = folder / "spec.yaml"
    document = {"splits": splits, "store": {"path": "store.zarr"}}
    path.write_text(yaml.safe_dump(document))
    return load_spec(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("e.json", '{\t"H": -13.5, "8": -2040, "Cu": 1e-5}'),
        ("e.yaml", "H: -1.35e1\n8: -2040\nCu: 0.00001\n"),
        ("e.yml", "{1: -13.5, O: -2040.0, '29': 1.0e-05}"),
    ],
)
def test_maps_name_elements_by_symbol_or_number(
    name: str, text: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    expected = {1: -13.5, 8: -2040.0, 29: 1e-5}
    assert read_reference_energies(tmp_path / name) == expected


def test_nobelium_is_an_element(tmp_path: Path) -> None:
    """A18: YAML 1.1 took its symbol for false."""
    (tmp_path / "e.yaml").write_text("No: 1e1\n")
    assert read_reference_energies(tmp_path / "e.yaml") == {102: 10.0}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("e.json", '{"Hx": 1}', "'Hx' is not an element"),
        ("e.json", '{"0": 1}', "'0' is not an element"),
        ("e.json", '{"119": 1}', "'119' is not an element"),
        ("e.json", '{"H": "1"}', "'H' has the energy"),
        ("e.json", '{"H": true}', "'H' has the energy"),
        ("e.json", '{"H": NaN}', "'H' has the energy"),
        ("e.json", "[1, 2]", "must be a map"),
        ("e.json", "{", "cannot be read as JSON"),
        ("e.json", '{"a":' * 100_000, "cannot be read as JSON"),
        ("e.yaml", "Nu: 1.0", "'Nu' is not an element"),
        ("e.yaml", "H: 1.0\nC: 2.0\nH: 3.0", "key 'H' is in lines 1 and 3"),
        ("e.yaml", "H: 1.0\n1: 2.0", "1 is in the file twice"),
        ("e.yaml", "H: on", "'H' has the energy"),
        ("e.yaml", "H: 010", "'H' has the energy"),
        ("e.json", '{"H": 1, "H": 2}', "the key 'H' is there twice"),
        ("e.yaml", "-1: 1.0", "-1 is not an element"),
        ("e.yaml", "H: [1]", "'H' has the energy"),
        ("e.yaml", "H: .inf", "'H' has the energy"),
        ("e.yaml", "H: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_other_files_are_refused_when_the_spec_is_read(
    name: str, text: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    path = write_frames(tmp_path / "d.extxyz", _water(1, -5))
    split = {"format": "extxyz", "path": path.name, "reference_energies": name}
    with pytest.raises(SpecError, match=words) as error:
        _spec(tmp_path, train=split)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_references_of_a_file_are_subtracted(tmp_path: Path) -> None:
    path = write_frames(tmp_path / "d.extxyz", _water(4, -5))
    (tmp_path / "e.json").write_text(json.dumps({"H": -3.0, "O": -7.0, "Pt": -6.0}))
    split = {"format": "extxyz", "path": path.name, "reference_energies": "e.json"}
    spec = _spec(tmp_path, train=split)
    assert spec.splits["train"].reference_energies == str(tmp_path / "e.json")
    found = make_build_plan(spec).attributes["label_statistics"]["train"]
    references = np.array(found["element_references"])
    assert {int(z): references[z] for z in np.flatnonzero(references)} == {
        1: -3.0,
        8: -7.0,
        78: -6.0,
    }
    assert found["energy_mean"] == pytest.approx(-15 + 0.015 + 13)


def test_elements_without_a_reference_are_named(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path / "d.extxyz", _water(2, -5))
    (tmp_path / "e.json").write_text(json.dumps({"Pt": -6.0}))
    with pytest.raises(SpecError, match=r"e\.json has no energy for H, O"):
        label_statistics(dataset, str(tmp_path / "e.json"))
    (tmp_path / "e.json").write_text(json.dumps({"O": -6.0}))
    with pytest.raises(SpecError, match="no energy for H;"):
        label_statistics(dataset, str(tmp_path / "e.json"))


def test_choices_of_a_split_are_checked(tmp_path: Path) -> None:
    path = write_frames(tmp_path / "d.extxyz", _water(1, -5))
    split = {"format": "extxyz", "path": path.name}
    with pytest.raises(SpecError, match=r"train\.reference_energies is 'per_elemnt'"):
        _spec(tmp_path, train=split | {"reference_energies": "per_elemnt"})
    with pytest.raises(SpecError, match=r"train\.reference_energies is '\.'"):
        _spec(tmp_path, train=split | {"reference_energies": "."})
    with pytest.raises(SpecError, match=r"train\.energy is for format oc20_raw"):
        _spec(tmp_path, train=split | {"energy": "total"})
    with pytest.raises(SpecError, match="'relative'"):
        _spec(tmp_path, train=split | {"format": "oc20_raw", "energy": "relative"})
    for format in ("oc20_raw", "oc20_lmdb", "ase_db", "aselmdb"):
        assert _spec(tmp_path, train=split | {"format": format})


def test_splits_of_different_kinds_are_refused_by_name(tmp_path: Path) -> None:
    write_frames(tmp_path / "a.extxyz", _water(5, -5))
    write_frames(tmp_path / "b.extxyz", _water(5, 0.1, first=5))
    splits: dict[str, dict[str, Any]] = {
        "train": {"format": "extxyz", "path": "a.extxyz"},
        "val": {"format": "extxyz", "path": "b.extxyz"},
    }
    words = (
        r"splits\.train has energies around -4\.99 eV per atom and splits\.val around "
        r"0\.123 eV .*splits\.val\.check_energy_kind: false"
    )
    with pytest.raises(DataError, match=words):
        make_build_plan(_spec(tmp_path, **splits))
    splits["val"]["check_energy_kind"] = False
    assert make_build_plan(_spec(tmp_path, **splits)).plans


def test_splits_of_one_kind_and_without_labels_pass(tmp_path: Path) -> None:
    write_frames(tmp_path / "a.extxyz", _water(5, -5))
    write_frames(tmp_path / "b.extxyz", _water(5, -4.5, first=5))
    write_frames(tmp_path / "c.extxyz", [frame("x", ["H"], [[0, 0, 0]])])
    splits = {
        name: {"format": "extxyz", "path": f"{name}.extxyz"} for name in ("a", "b", "c")
    }
    assert make_build_plan(_spec(tmp_path, **splits)).plans


def test_small_energies_are_of_any_kind(tmp_path: Path) -> None:
    """Adsorption energies may differ by any factor, not by electronvolts per atom."""
    first = _dataset(tmp_path / "a.extxyz", _water(3, -1.0))
    second = _dataset(tmp_path / "b.extxyz", _water(3, 0.001))
    assert find_differing_kinds(list(first), list(second)) is None


def _samples(folder: Path, names: list[str], every: int) -> list[Sample]:
    return [
        sample
        for name in names
        for sample in list(open_dataset("extxyz", str(folder / name), every=every))
    ]


def test_real_totals_and_adsorption_energies_are_told_apart() -> None:
    """Relaxations with raw totals against the same less their last energies."""
    folder = data_folder("oc20_s2ef_debug")
    names = [f"random1000{n}.extxyz.xz" for n in ("100", "142", "164", "169", "187")]
    systems = [_samples(folder, [name], 10) for name in names]
    totals = [sample for system in systems for sample in system]
    adsorption = [
        replace(sample, energy=sample.energy - system[-1].energy)
        for system in systems
        for sample in system
    ]
    found = find_differing_kinds(totals, adsorption)
    assert found is not None
    assert found[0] < -2 < abs(found[1])
    assert find_differing_kinds(adsorption, totals) == (found[1], found[0])
    halves = [part for system in systems for part in system[::2]]
    assert find_differing_kinds(totals, halves) is None
    assert find_differing_kinds(adsorption, adsorption[::2]) is None
    for first in range(len(systems)):
        for second in range(first):
            assert find_differing_kinds(systems[first], systems[second]) is None


def test_real_sets_of_one_kind_are_never_told_apart() -> None:
    """All-electron molecules and metals, each level with its like."""
    molecules = [
        _samples(data_folder(folder), [name], 50)
        for folder, name in (
            ("acac", "train_300K.xyz.gz"),
            ("acac", "train_600K.xyz.gz"),
            ("ethanol_rmd17", "train.xyz.gz"),
            ("3bpa", "train_300K.xyz.gz"),
        )
    ]
    bulk = data_folder("mlearn_bulk")
    solids = [_samples(bulk, [f"{e}_test.extxyz.gz"], 3) for e in ("Si", "Mo", "Li")]
    for group in (molecules, solids):
        for first in group:
            for second in group:
                assert find_differing_kinds(first, second) is None
    for first in molecules:
        assert all(np.isfinite(s.energy) for s in first)
        shifted = [replace(s, energy=s.energy + 600 * len(s.structure)) for s in first]
        assert find_differing_kinds(first, shifted) is not None
