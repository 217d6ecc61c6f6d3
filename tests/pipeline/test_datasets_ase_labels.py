"""Labels, units and constraints in ASE databases and .aselmdb files."""

import pickle
from pathlib import Path
from typing import Any

import ase.db
import numpy as np
import pytest
from ase.constraints import (
    FixAtoms,
    FixBondLengths,
    FixCartesian,
    FixedLine,
    FixScaled,
)

from pipeline.datasets import ReadOptions, open_dataset
from pipeline.datasets.labels import warn_of_missing_labels
from pipeline.errors import DataError
from pipeline.spec.units import Units
from tests.pipeline.oc20_files import packed_json, write_lmdb

# CODATA 2014, as ASE has them.
HARTREE, BOHR, KCAL = 27.211386024367243, 0.5291772105638411, 0.04336410390059322
ENERGY, FORCES = -76.25, [[0.5, 0.0, -1.0], [0.25, 1.0, 0.0], [0.0, 0.0, 2.0]]
POSITIONS = [[0.0, 0.0, 0.1], [0.0, 0.8, -0.5], [0.0, -0.8, -0.5]]
KEYS = ReadOptions(energy_key="data.energy", forces_key="data.forces")


def _array(values: Any) -> dict[str, Any]:
    flat = np.asarray(values)
    return {"__ndarray__": [list(flat.shape), str(flat.dtype), flat.ravel().tolist()]}


def _write(path: Path, metadata: dict[str, Any] | None = None, count: int = 2) -> Path:
    """Water as schnetpack writes it: labels in ``data``, units in the metadata."""
    data = {"energy": np.array([ENERGY]), "forces": np.array(FORCES)}
    if path.suffix == ".aselmdb":
        row = {"numbers": _array([8, 1, 1]), "positions": _array(POSITIONS)}
        row["data"] = {name: _array(value) for name, value in data.items()}  # type: ignore[assignment]
        rows = {str(i + 1): packed_json(row) for i in range(count)}
        if metadata is not None:
            rows["metadata"] = packed_json(metadata)
        return write_lmdb(path, rows)
    with ase.db.connect(path) as database:
        for _ in range(count):
            database.write(ase.Atoms("OH2", POSITIONS), data=data)
    if metadata is not None:
        ase.db.connect(path).metadata = metadata
    return path


def _open(path: Path, options: ReadOptions = KEYS) -> Any:
    format = "aselmdb" if path.suffix == ".aselmdb" else "ase_db"
    return open_dataset(format, str(path), options=options)


@pytest.fixture(params=[".db", ".json", ".aselmdb"])
def path(request: Any, tmp_path: Path) -> Path:
    return tmp_path / f"d{request.param}"


def _units(energy: str, forces: str, length: str = "Ang") -> dict[str, Any]:
    return {
        "_property_unit_dict": {"energy": energy, "forces": forces},
        "_distance_unit": length,
        "atomrefs": {"energy": [0.0] * 100},
    }


@pytest.mark.parametrize(
    ("metadata", "energy", "forces", "length"),
    [
        (None, 1, 1, 1),
        ({}, 1, 1, 1),
        (_units("eV", "eV/Ang"), 1, 1, 1),
        (_units("Hartree", "Hartree/Bohr", "Bohr"), HARTREE, HARTREE / BOHR, BOHR),
        (_units("Ha", "Ha/Ang", "Angstrom"), HARTREE, HARTREE, 1),
        (_units("kcal/mol", "kcal/mol/Ang"), KCAL, KCAL, 1),
        ({"_property_unit_dict": {"energy": "Hartree"}}, HARTREE, HARTREE, 1),
        ({"_distance_unit": "Bohr"}, 1, 1 / BOHR, BOHR),
    ],
)
def test_labels_in_data_have_the_units_of_the_metadata(
    metadata: Any, energy: float, forces: float, length: float, path: Path
) -> None:
    """A1: databases of schnetpack and nablaDFT."""
    dataset = pickle.loads(pickle.dumps(_open(_write(path, metadata))))
    for i in range(2):
        sample = dataset[i]
        assert sample.energy == pytest.approx(ENERGY * energy, rel=1e-7)
        expected = np.array(FORCES) * forces
        assert sample.forces == pytest.approx(expected, rel=1e-6)
        positions = np.array(POSITIONS) * length
        assert sample.structure.positions == pytest.approx(positions, rel=1e-7)


def test_units_that_are_taken_are_logged(path: Path, caplog: Any) -> None:
    """A1: nothing is converted in silence."""
    _write(path, _units("Hartree", "Hartree/Bohr", "Bohr"))
    with caplog.at_level("INFO"):
        _open(path)
    expected = (
        f"{path}: by its metadata, energy is in Hartree, length is in Bohr, "
        "forces is in Hartree/Bohr"
    )
    assert expected in caplog.messages


@pytest.mark.parametrize(
    ("split", "words"),
    [
        (Units(energy="eV"), "the unit of energy is 'Hartree' by its metadata"),
        (Units(length="Å"), "the unit of length is 'Bohr'"),
        (Units(forces="Hartree/Å"), "the unit of forces is 'Hartree/Bohr'"),
        (Units("Ha", "a0"), None),
        (Units("Ha", "a0", "Eh/Bohr"), None),
    ],
)
def test_units_that_disagree_are_refused(
    split: Units, words: str | None, path: Path
) -> None:
    """A1: the split and the metadata must not say two things."""
    _write(path, _units("Hartree", "Hartree/Bohr", "Bohr"))
    options = ReadOptions("data.energy", "data.forces", units=split)
    if words is None:
        assert _open(path, options)[0].energy == pytest.approx(ENERGY * HARTREE)
        return
    with pytest.raises(DataError, match=words) as error:
        _open(path, options)
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).endswith(
        "the split's units: has another unit; remove one of the two."
    )


@pytest.mark.parametrize(
    ("unit", "words"),
    [("kcal", "unknown unit of energy 'kcal'"), (27.2, "the unit 27.2 of data.energy")],
)
def test_units_that_are_unknown_are_refused(unit: Any, words: str, path: Path) -> None:
    """A1: a unit is never guessed."""
    _write(path, {"_property_unit_dict": {"energy": unit}})
    with pytest.raises(DataError, match=words) as error:
        _open(path)
    assert str(path) in str(error.value)
    assert np.isnan(_open(path, ReadOptions())[0].energy)


def test_labels_in_data_are_named_where_no_key_is(path: Path, caplog: Any) -> None:
    """A1: without keys a warning names what the rows have."""
    dataset = _open(_write(path), ReadOptions())
    samples = [dataset[i] for i in range(2)]
    assert all(np.isnan(sample.energy) for sample in samples)
    warn_of_missing_labels("splits.train", dataset)
    assert (
        "splits.train: 2 of 2 samples have no energy; the first is '1' and has "
        "'data.energy', 'data.forces'; set splits.train.energy_key" in caplog.messages
    )


def test_energies_in_key_value_pairs_are_read_by_their_names(tmp_path: Path) -> None:
    """A1: also in key-value pairs, with or without the name of that part."""
    path = tmp_path / "d.db"
    ase.db.connect(path).write(ase.Atoms("H"), e_dft=-3.5, free=True)
    for key in ("e_dft", "key_value_pairs.e_dft"):
        assert _open(path, ReadOptions(energy_key=key))[0].energy == -3.5


def test_several_databases_are_one_split(tmp_path: Path) -> None:
    """C: a folder, a list or a glob; A9: a copy of another kind is refused."""
    for name, energy in (("a.db", 1.5), ("b.json", 2.5), ("c.db", 3.5)):
        data = {"energy": np.array([energy])}
        ase.db.connect(tmp_path / name).write(ase.Atoms("H"), data=data)
    options = ReadOptions(energy_key="data.energy")
    for place in (str(tmp_path), [str(tmp_path / n) for n in ("a.db", "b.json")]):
        dataset = open_dataset("ase_db", place, options=options)
        again = pickle.loads(pickle.dumps(dataset))
        energies = [again[i].energy for i in range(len(again))]
        assert energies == [1.5, 2.5, 3.5][: len(again)]
        assert list(again.sample_ids) == ["a_1", "b_1", "c_1"][: len(again)]
    part = open_dataset("ase_db", str(tmp_path), options=options, offset=1, limit=1)
    assert list(part.sample_ids) == ["b_1"]
    ase.db.connect(tmp_path / "a.json").write(ase.Atoms("H"))
    with pytest.raises(DataError, match=r"a\.db and .*a\.json are the same file twice"):
        open_dataset("ase_db", str(tmp_path))


CONSTRAINTS = [
    FixAtoms([0]),
    FixCartesian([1], (1, 0, 0)),
    FixCartesian([1], (0, 1, 1)),
    FixScaled([2], (1, 1, 1)),
    FixCartesian([3], (1, 1, 0)),
    FixedLine(4, (0, 0, 1)),
    FixBondLengths([[3, 4]]),
]
KEPT = (
    "a store only knows atoms held on all axes, as FixAtoms and the columns fixed and "
    "move_mask hold them"
)
LOST = "FixBondLengths (2), FixCartesian (2), FixedLine (2)"


def _constrained(path: Path) -> Path:
    atoms = ase.Atoms("H5", np.arange(15.0).reshape(5, 3), cell=[9, 9, 99])
    if path.suffix == ".aselmdb":
        row = {"numbers": _array([1] * 5), "positions": _array(atoms.positions)}
        row["constraints"] = [c.todict() for c in CONSTRAINTS]  # type: ignore[assignment]
        free = {name: row[name] for name in ("numbers", "positions")}
        rows = {"1": packed_json(row), "2": packed_json(row), "3": packed_json(free)}
        return write_lmdb(path, rows)
    database = ase.db.connect(path)
    database.write(atoms)
    atoms.set_constraint(CONSTRAINTS)
    for _ in range(2):
        database.write(atoms)
    return path


def test_constraints_that_are_lost_are_named(path: Path, caplog: Any) -> None:
    """Only atoms held on all axes are kept; everything else is a warning."""
    dataset = _open(_constrained(path), ReadOptions())
    fixed = [dataset[i].structure.fixed.tolist() for i in range(3)]
    assert sorted(fixed) == [[False] * 5, *[[True, True, True, False, False]] * 2]
    assert caplog.messages == [
        f"{path}: 2 of 3 samples have constraints that are not kept: {LOST}; {KEPT}"
    ]


@pytest.mark.parametrize("format", ["extxyz", "oc20_raw"])
def test_masks_on_some_axes_are_named(format: str, tmp_path: Path, caplog: Any) -> None:
    """The same in extended XYZ, whose mask can hold single axes."""
    path = tmp_path / "d.extxyz"
    path.write_text(
        "".join(
            "2\nProperties=species:S:1:pos:R:3:move_mask:L:3 pbc=F\n"
            f"H 0 0 0 {mask}\nH 0 0 1 T T T\n"
            for mask in ("F F F", "F F T")
        )
    )
    dataset = open_dataset(format, str(path))
    assert dataset[0].structure.fixed.tolist() == [True, False]
    assert not dataset[1].structure.fixed.any()
    assert caplog.messages == [
        f"{path}: 1 of 2 samples have constraints that are not kept: move_mask (1); "
        f"{KEPT}"
    ]
