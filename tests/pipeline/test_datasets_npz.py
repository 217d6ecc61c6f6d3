"""Frames in .npz files, in the layouts of rMD17 and of sGDML and MD17."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.datasets import ReadOptions, npz, open_dataset
from pipeline.datasets.labels import warn_of_missing_labels
from pipeline.errors import DataError
from pipeline.spec.units import Units

# kcal/mol and Hartree in eV, Bohr in Å (CODATA 2014, as ASE has them).
KCAL, HARTREE, BOHR = 0.04336410390059322, 27.211386024367243, 0.5291772105638411
RNG = np.random.default_rng(5)
NUMBERS = np.array([6, 8, 1, 1], np.uint8)
POSITIONS = RNG.normal(size=(6, 4, 3)) * 2
ENERGIES = RNG.normal(size=6) * 10 - 97000.0
FORCES = RNG.normal(size=(6, 4, 3)) * 30
INDICES = np.array([17, 3, 99, 4, 0, 5])


def _rmd17(path: Path, save: Any = np.savez, **changes: Any) -> Path:
    """A file as rMD17 has it; an array that is None is left out."""
    arrays: dict[str, Any] = {
        "nuclear_charges": NUMBERS,
        "coords": POSITIONS,
        "energies": ENERGIES,
        "forces": FORCES,
        "old_indices": INDICES,
        "old_energies": ENERGIES - 1,
        "old_forces": FORCES + 1,
    }
    arrays = {k: v for k, v in (arrays | changes).items() if v is not None}
    save(path, **arrays)
    return path


def _sgdml(path: Path, **changes: Any) -> Path:
    """A file as sGDML and MD17 have it."""
    arrays: dict[str, Any] = {
        "z": NUMBERS,
        "R": POSITIONS,
        "E": ENERGIES[:, None],
        "F": FORCES,
        "name": np.array("water"),
        "theory": np.array(b"CCSD(T)"),
        "type": np.array("d"),
    }
    arrays = {k: v for k, v in (arrays | changes).items() if v is not None}
    np.savez(path, **arrays)
    return path


def _open(path: Path, options: ReadOptions | None = None, **selection: Any) -> Any:
    return open_dataset("npz", str(path), options=options, **selection)


def _assert_is(sample: Any, i: int, energy: float, length: float = 1.0) -> None:
    assert sample.energy == pytest.approx(ENERGIES[i] * energy, rel=1e-9)
    expected = FORCES[i] * (energy / length)
    assert sample.forces == pytest.approx(expected, rel=1e-6)
    positions = POSITIONS[i] * length
    assert sample.structure.positions == pytest.approx(positions, rel=1e-9)
    assert sample.structure.atomic_numbers.tolist() == NUMBERS.tolist()
    assert not sample.structure.fixed.any()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_rmd17_is_in_kcal_per_mol(save: Any, tmp_path: Path, caplog: Any) -> None:
    """C: a reader for .npz; the unit that is assumed is logged."""
    path = _rmd17(tmp_path / "rmd17_x.npz", save)
    with caplog.at_level("INFO"):
        dataset = pickle.loads(pickle.dumps(_open(path)))
    assert list(dataset.sample_ids) == ["17", "3", "99", "4", "0", "5"]
    assert dataset.n_atoms.tolist() == [4] * 6
    for i in range(6):
        _assert_is(dataset[i], i, KCAL)
        assert not dataset[i].structure.pbc.any()
    assert caplog.messages == [
        f"{path}: neither the file nor units: of the split states units; energy in "
        "kcal/mol and length in Å is assumed, as in files of rMD17"
    ]


def test_the_dataset_is_small_where_it_is_sent(tmp_path: Path) -> None:
    coords = np.zeros((500, 4, 3))
    path = _rmd17(
        tmp_path / "a.npz",
        coords=coords + np.arange(12.0).reshape(4, 3),
        energies=np.zeros(500),
        forces=coords,
        old_indices=None,
    )
    assert len(pickle.dumps(_open(path, limit=3))) < 2500


@pytest.mark.parametrize(
    ("units", "energy", "length"),
    [
        (Units(energy="eV"), 1.0, 1.0),
        (Units(energy="Hartree"), HARTREE, 1.0),
        (Units(energy="Hartree", length="Bohr"), HARTREE, BOHR),
        (Units(length="Bohr"), KCAL, BOHR),
    ],
)
def test_the_split_may_name_other_units(
    units: Units, energy: float, length: float, tmp_path: Path
) -> None:
    for write in (_rmd17, _sgdml):
        dataset = _open(write(tmp_path / "a.npz"), ReadOptions(units=units))
        for i in range(6):
            _assert_is(dataset[i], i, energy, length)


@pytest.mark.parametrize(
    ("changes", "energy", "length"),
    [
        ({}, KCAL, 1.0),
        ({"E": ENERGIES}, KCAL, 1.0),
        ({"e_unit": np.array("kcal/mol"), "r_unit": np.array("Ang")}, KCAL, 1.0),
        ({"e_unit": np.array("eV"), "r_unit": np.array("Ang")}, 1.0, 1.0),
        ({"e_unit": np.array(b"Hartree"), "r_unit": np.array(b"bohr")}, HARTREE, BOHR),
        ({"e_unit": np.array(["eV"])}, 1.0, 1.0),
    ],
)
def test_sgdml_states_its_units(
    changes: Any, energy: float, length: float, tmp_path: Path
) -> None:
    dataset = _open(_sgdml(tmp_path / "a.npz", **changes))
    assert list(dataset.sample_ids) == list("012345")
    for i in range(6):
        _assert_is(dataset[i], i, energy, length)


def test_a_lattice_has_its_vectors_as_columns(tmp_path: Path) -> None:
    lattice = np.array([[4.0, 1.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 20.0]])
    path = _sgdml(tmp_path / "a.npz", lattice=lattice, r_unit=np.array("Bohr"))
    structure = _open(path)[0].structure
    expected = [[4, 0, 0], [1, 5, 0], [0, 0, 20]]
    assert structure.cell == pytest.approx(np.array(expected) * BOHR)
    assert structure.pbc.all()


@pytest.mark.parametrize(
    ("changes", "units", "words"),
    [
        ({"e_unit": np.array("eV")}, Units(energy="Ha"), "energy is 'eV' by the file"),
        ({"r_unit": np.array("Ang")}, Units(length="Bohr"), "length is 'Ang'"),
        ({"e_unit": np.array("kcal")}, Units(), "unknown unit of energy 'kcal'"),
        ({"e_unit": np.array(["a", "b"])}, Units(), "unknown unit of energy"),
    ],
)
def test_units_that_cannot_be_are_refused(
    changes: Any, units: Units, words: str, tmp_path: Path
) -> None:
    path = _sgdml(tmp_path / "a.npz", **changes)
    with pytest.raises(DataError, match=words) as error:
        _open(path, ReadOptions(units=units))
    assert str(path) in str(error.value)


def test_keys_and_where(tmp_path: Path) -> None:
    path = _rmd17(tmp_path / "a.npz", kind=np.array([0, 1, 0, 1, 0, 1]))
    options = ReadOptions("old_energies", "old_forces", where=(("kind", (1,)),))
    dataset = _open(path, options, offset=1)
    assert list(dataset.sample_ids) == ["4", "5"]
    assert dataset[0].energy == pytest.approx((ENERGIES[3] - 1) * KCAL)
    assert dataset[0].forces == pytest.approx((FORCES[3] + 1) * KCAL, rel=1e-6)


def test_labels_that_are_missing_are_named(tmp_path: Path, caplog: Any) -> None:
    dataset = _open(_rmd17(tmp_path / "a.npz", energies=None, forces=None))
    warn_of_missing_labels("splits.a", dataset)
    assert "6 of 6 samples have no energy; the first is '17'" in caplog.text
    assert "'old_energies', 'old_forces'; set splits.a.energy_key" in caplog.text


def test_several_files_are_one_split(tmp_path: Path) -> None:
    """C: indices of two molecules are counted apart."""
    _rmd17(tmp_path / "b.npz")
    _sgdml(tmp_path / "a.npz", R=POSITIONS[:2], E=ENERGIES[:2], F=FORCES[:2])
    dataset = _open(tmp_path)
    ids = ["a_0", "a_1", "b_0", "b_1", "b_2", "b_3", "b_4", "b_5"]
    assert list(dataset.sample_ids) == ids
    for i in range(8):
        _assert_is(dataset[i], i if i < 2 else i - 2, KCAL)
    part = _open(tmp_path, offset=1, every=3)
    assert list(part.sample_ids) == ["a_1", "b_2", "b_5"]
    _assert_is(part[2], 5, KCAL)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"coords": None}, "no known layout; it needs nuclear_charges and coords"),
        ({"nuclear_charges": NUMBERS[None]}, r"nuclear_charges has shape \(1, 4\)"),
        ({"nuclear_charges": np.array(list("COHH"))}, "nuclear_charges has shape"),
        ({"coords": POSITIONS[:, :3]}, r"coords has shape \(6, 3, 3\), expected"),
        ({"coords": POSITIONS[0]}, "coords has shape"),
        ({"energies": ENERGIES[:5]}, r"energies has shape \(5,\), but coords has 6"),
        ({"energies": np.float64(1)}, "energies has shape"),
        ({"forces": FORCES[:5]}, "forces has shape"),
        ({"cell": np.eye(3)}, "has 'cell', but the layout of rMD17 has no cell"),
        ({"forces": np.array([None] * 6)}, "Python objects, which could run code"),
    ],
)
def test_files_that_cannot_be_are_refused(
    changes: Any, words: str, tmp_path: Path
) -> None:
    path = _rmd17(tmp_path / "a.npz", **changes)
    with pytest.raises(DataError, match=words) as error:
        _open(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "mark",)

    path = _rmd17(tmp_path / "a.npz", old_forces=np.array([Touch()] * 6))
    with pytest.raises(DataError, match="Python objects"):
        _open(path)
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Touch()))
    with pytest.raises(DataError, match="cannot be read as"):
        _open(tmp_path / "b.npz")
    assert not (tmp_path / "mark").exists()


def test_damaged_files_end_in_one_sentence(tmp_path: Path) -> None:
    whole = _rmd17(tmp_path / "a.npz", np.savez_compressed).read_bytes()
    path = tmp_path / "b.npz"
    broken = bytearray(whole)
    broken[len(whole) // 3] ^= 255
    np.save(tmp_path / "one.npy", ENERGIES)
    single = (tmp_path / "one.npy").read_bytes()
    for raw in (b"", b"no archive", whole[:-40], whole[:999], bytes(broken), single):
        path.write_bytes(raw)
        with pytest.raises(DataError) as error:
            _open(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="does not exist"):
        _open(tmp_path / "absent.npz")


def test_archives_that_unpack_to_too_much_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _rmd17(tmp_path / "a.npz", np.savez_compressed)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.npy", bytes(9 << 20))
    monkeypatch.setattr(npz, "MAX_BYTES", 8 << 20)
    with pytest.raises(DataError, match="unpacks to 9 MB and is refused"):
        _open(path)
