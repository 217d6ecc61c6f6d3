"""HDF5 files in the layouts of SPICE and ANI-1x, against files that h5py writes."""

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pipeline.datasets import ReadOptions, hdf5, open_dataset
from pipeline.errors import DataError
from pipeline.spec.units import Units

# CODATA 2014, as ASE has them.
HARTREE, BOHR = 27.211386024367243, 0.5291772105638411
RNG = np.random.default_rng(11)
# Molecules by name: atomic numbers and number of conformations.
MOLECULES = {"ala": ([6, 1, 8], 4), "H2O": ([8, 1, 1, 1], 2), "[Na+]": ([11, 17], 3)}
POSITIONS = {k: RNG.normal(size=(m, len(z), 3)) for k, (z, m) in MOLECULES.items()}
ENERGIES = {k: RNG.normal(size=m) - 500 for k, (_, m) in MOLECULES.items()}
FORCES = {k: RNG.normal(size=(m, len(z), 3)) for k, (z, m) in MOLECULES.items()}
# HDF5 has its groups in the order of their names.
IDS = [f"{k}/{i}" for k in sorted(MOLECULES) for i in range(MOLECULES[k][1])]


def _spice(path: Path, units: tuple[str, str, str] | None = None) -> Path:
    """A file as SPICE has it."""
    with h5py.File(path, "w") as file:
        for name, (numbers, _) in MOLECULES.items():
            group = file.create_group(name)
            group["atomic_numbers"] = np.array(numbers, np.int16)
            group["subset"] = np.array([b"PubChem" if name == "ala" else b"Ion"])
            group["smiles"] = ["C"]
            made = [
                group.create_dataset("conformations", data=POSITIONS[name]),
                group.create_dataset("dft_total_energy", data=ENERGIES[name]),
                group.create_dataset(
                    "dft_total_gradient", data=-FORCES[name], compression="gzip"
                ),
            ]
            group["formation_energy"] = ENERGIES[name] + 400
            for data, unit in zip(made, units or (), strict=bool(units)):
                data.attrs["units"] = unit
    return path


def _ani(path: Path) -> Path:
    """A file as ANI-1x has it; some energies and forces are not computed."""
    with h5py.File(path, "w") as file:
        for name, (numbers, _) in MOLECULES.items():
            group = file.create_group(name)
            group["atomic_numbers"] = np.array(numbers, np.uint8)
            group["coordinates"] = POSITIONS[name].astype("f4")
            energies, forces = ENERGIES[name].copy(), FORCES[name].astype("f4")
            if name == "ala":
                energies[1], forces[2] = np.nan, np.nan
            group["wb97x_dz.energy"] = energies
            group["wb97x_dz.forces"] = forces
            group["ccsd(t)_cbs.energy"] = ENERGIES[name] - 1
    return path


def _open(path: Path, options: ReadOptions | None = None, **selection: Any) -> Any:
    return open_dataset("hdf5", str(path), options=options, **selection)


def _assert_is(sample: Any, energy: float, length: float, forces: float) -> None:
    name, number = sample.sample_id.rsplit("/", 1)
    k = int(number)
    assert sample.energy == pytest.approx(ENERGIES[name][k] * energy, rel=1e-9)
    assert sample.forces == pytest.approx(FORCES[name][k] * forces, rel=1e-5)
    structure = sample.structure
    positions = POSITIONS[name][k] * length
    assert structure.positions == pytest.approx(positions, rel=1e-5)
    assert structure.atomic_numbers.tolist() == MOLECULES[name][0]
    assert not structure.pbc.any()


@pytest.mark.parametrize(
    ("units", "energy", "length", "forces"),
    [
        (None, HARTREE, BOHR, HARTREE / BOHR),
        (("bohr", "hartree", "hartree/bohr"), HARTREE, BOHR, HARTREE / BOHR),
        (("angstrom", "eV", "eV/angstrom"), 1.0, 1.0, 1.0),
    ],
)
def test_spice_has_gradients_in_atomic_units(
    units: Any, energy: float, length: float, forces: float, tmp_path: Path
) -> None:
    """C: a reader for the layout of SPICE; forces are minus the gradient."""
    path = _spice(tmp_path / "s.hdf5", units)
    dataset = pickle.loads(pickle.dumps(_open(path)))
    assert list(dataset.sample_ids) == IDS
    assert dataset.n_atoms.tolist() == [4, 4, 2, 2, 2, 3, 3, 3, 3]
    for i in range(len(IDS)):
        assert dataset[i].sample_id == IDS[i]
        _assert_is(dataset[i], energy, length, forces)


def test_units_that_are_assumed_are_logged(tmp_path: Path, caplog: Any) -> None:
    path = _spice(tmp_path / "s.hdf5")
    with caplog.at_level("INFO"):
        _open(path)
    assert caplog.messages == [
        f"{path}: neither the file nor units: of the split states units; energy in "
        "Hartree and length in Bohr is assumed, as in files of SPICE"
    ]


def test_ani_has_forces_and_gaps(tmp_path: Path) -> None:
    """C: a reader for the layout of ANI-1x; what is not computed is NaN."""
    dataset = _open(_ani(tmp_path / "a.h5"))
    assert list(dataset.sample_ids) == IDS
    for i, sample_id in enumerate(IDS):
        sample = dataset[i]
        if sample_id == "ala/1":
            assert np.isnan(sample.energy)
            assert np.isfinite(sample.forces).all()
        elif sample_id == "ala/2":
            assert np.isnan(sample.forces).all()
            assert np.isfinite(sample.energy)
        else:
            _assert_is(sample, HARTREE, 1.0, HARTREE)


def test_keys_units_and_where(tmp_path: Path) -> None:
    path = _ani(tmp_path / "a.h5")
    dataset = _open(path, ReadOptions("ccsd(t)_cbs.energy", units=Units(energy="eV")))
    assert dataset[0].energy == pytest.approx(ENERGIES["H2O"][0] - 1)
    path = _spice(tmp_path / "s.hdf5")
    for gradient_key in (None, "dft_total_gradient"):
        options = ReadOptions(
            "formation_energy",
            gradient_key=gradient_key,
            where=(("subset", ("PubChem",)),),
        )
        dataset = _open(path, options, limit=2)
        assert list(dataset.sample_ids) == ["ala/0", "ala/1"]
        expected = (ENERGIES["ala"][1] + 400) * HARTREE
        assert dataset[1].energy == pytest.approx(expected)
        forces = FORCES["ala"][1] * HARTREE / BOHR
        assert dataset[1].forces == pytest.approx(forces, rel=1e-6)


def test_units_that_disagree_are_refused(tmp_path: Path) -> None:
    path = _spice(tmp_path / "s.hdf5", ("bohr", "hartree", "hartree/bohr"))
    with pytest.raises(DataError, match="the unit of energy is 'hartree' by the file"):
        _open(path, ReadOptions(units=Units(energy="eV")))
    path = _spice(tmp_path / "t.hdf5", ("bohr", "kcal", "hartree/bohr"))
    with pytest.raises(DataError, match="unknown unit of energy 'kcal'"):
        _open(path)


@pytest.mark.parametrize(
    ("selection", "ids"),
    [
        ({"offset": 3}, IDS[3:]),
        ({"offset": 1, "every": 3, "limit": 2}, [IDS[1], IDS[4]]),
        ({"limit": 5}, IDS[:5]),
    ],
)
def test_offset_every_and_limit_choose_conformations(
    selection: dict[str, int], ids: list[str], tmp_path: Path
) -> None:
    dataset = _open(_spice(tmp_path / "s.hdf5"), **selection)
    assert list(dataset.sample_ids) == ids
    for i in range(len(ids)):
        _assert_is(dataset[i], HARTREE, BOHR, HARTREE / BOHR)


def test_several_files_and_nested_groups(tmp_path: Path) -> None:
    """C: a folder of files; molecules may lie deeper, or be the whole file."""
    _spice(tmp_path / "b.h5")
    with (
        h5py.File(tmp_path / "a.hdf5", "w") as file,
        h5py.File(tmp_path / "b.h5") as other,
    ):
        other.copy("ala", file.create_group("x/y"))
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["atomic_numbers"] = MOLECULES["ala"][0]
        file["conformations"] = POSITIONS["ala"]
    dataset = _open(tmp_path)
    ids = [f"a/x/y/ala/{i}" for i in range(4)] + [f"b/{name}" for name in IDS]
    assert list(dataset.sample_ids) == ids + [f"c/{i}" for i in range(4)]
    assert dataset[1].energy == pytest.approx(ENERGIES["ala"][1] * HARTREE)
    assert dataset[4].energy == pytest.approx(ENERGIES["H2O"][0] * HARTREE)
    assert np.isnan(dataset[14].energy)


def test_threads_read_the_same(tmp_path: Path) -> None:
    dataset = _open(_spice(tmp_path / "s.hdf5"))
    with ThreadPoolExecutor(4) as pool:
        for sample in pool.map(dataset.__getitem__, [*range(9)] * 5):
            _assert_is(sample, HARTREE, BOHR, HARTREE / BOHR)


def _change(path: Path, name: str, value: Any) -> Path:
    """A file of SPICE with one data set of a molecule replaced; None removes it."""
    with h5py.File(_spice(path), "a") as file:
        del file[f"ala/{name}"]
        if value is not None:
            file[f"ala/{name}"] = value
    return path


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("conformations", None, "group 'ala' lacks 'conformations'"),
        ("conformations", ["a", "b"], "expected \\(frames, atoms, 3\\)"),
        ("conformations", np.zeros((4, 2, 3)), "expected \\(frames, atoms, 3\\)"),
        ("conformations", h5py.SoftLink("/H2O/conformations"), "lacks"),
        ("conformations", h5py.ExternalLink("o.h5", "x"), "lacks"),
        ("atomic_numbers", np.int64(6), "expected \\(frames, atoms, 3\\)"),
        ("atomic_numbers", [6, 0, 1], "the atomic number 0"),
        ("dft_total_gradient", np.zeros((4, 2, 3)), "forces of shape"),
        ("conformations", np.full((4, 3, 3), np.nan), "positions with"),
    ],
)
def test_groups_that_cannot_be_are_refused(
    name: str, value: Any, words: str, tmp_path: Path
) -> None:
    path = _change(tmp_path / "s.h5", name, value)
    with pytest.raises(DataError, match=words) as error:
        dataset = _open(path)
        _ = [dataset[i] for i in range(9)]
    assert str(error.value).startswith(str(path))
    assert "ala" in str(error.value)
    assert "\n" not in str(error.value)


def test_links_to_other_files_are_not_followed(tmp_path: Path) -> None:
    other = _spice(tmp_path / "other.h5")
    path = _spice(tmp_path / "s.h5")
    with h5py.File(path, "a") as file:
        file["aaa"] = h5py.ExternalLink(str(other), "/ala")
        del file["ala/dft_total_energy"]
        link = h5py.ExternalLink(str(other), "/ala/dft_total_energy")
        file["ala/dft_total_energy"] = link
    dataset = _open(path)
    assert list(dataset.sample_ids) == IDS
    assert np.isnan(dataset[8].energy)


def test_loops_and_large_pieces_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "loop.h5"
    with h5py.File(path, "w") as file:
        inner = file.create_group("a")
        inner["b"] = inner
    with pytest.raises(DataError, match="its group 'a/b' has a second name"):
        _open(path)
    monkeypatch.setattr(hdf5, "MAX_PIECE_BYTES", 32)
    with pytest.raises(DataError, match="'conformations' has pieces of over"):
        _open(_spice(tmp_path / "s.h5"))


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    whole = _spice(tmp_path / "s.h5").read_bytes()
    for raw in (b"", b"no HDF5" * 99, whole[:-100], whole[: len(whole) // 2]):
        path.write_bytes(raw)
        with pytest.raises(DataError, match="cannot be read as HDF5") as error:
            _open(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    with h5py.File(path, "w") as file:
        file["x"] = np.zeros(3)
    with pytest.raises(DataError, match="has no group with 'atomic_numbers'"):
        _open(path)
    with h5py.File(path, "a") as file:
        file["m/atomic_numbers"] = [1]
        file["m/geometries"] = np.zeros((1, 1, 3))
    with pytest.raises(
        DataError, match="group 'm' has atomic_numbers, geometries, but"
    ):
        _open(path)


def test_the_extra_is_named_where_h5py_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _spice(tmp_path / "s.h5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(
        DataError, match=r"needs the package h5py.*'kd-train\[hdf5\]'"
    ) as error:
        _open(path)
    assert str(path) in str(error.value)
