"""Stresses and virials of files: signs, units, both at once, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.io import write

from pipeline.datasets import Dataset, ReadOptions, open_dataset, open_split
from pipeline.datasets.rattled import Rattled
from pipeline.errors import DataError
from pipeline.spec.sections import RattleSpec, SplitSpec
from pipeline.spec.units import Units, stress_factor
from tests.frames import frame, write_frames
from tests.teachers.shared_data import shared_file

CELL = [4.0, 0, 0, 0.5, 4.2, 0, 0.1, -0.3, 3.9]
VOIGT = [0.01, -0.02, 0.03, 0.004, -0.005, 0.006]  # xx yy zz yz xz xy
FULL = np.array([[0.01, 0.006, -0.005], [0.006, -0.02, 0.004], [-0.005, 0.004, 0.03]])
VOLUME = abs(float(np.linalg.det(np.reshape(CELL, (3, 3)))))


def _write(path: Path, header: str, cell: bool = True) -> Path:
    lattice = f'Lattice="{" ".join(map(str, CELL))}" pbc="T T T"' if cell else ""
    text = frame("a", ["Cu", "Cu"], [[0, 0, 0], [2, 2, 2]], header=lattice or 'pbc="F"')
    return write_frames(path, [text.replace("sample_id", f"{header} sample_id")])


def _words(values: np.ndarray | list[float]) -> str:
    return '"' + " ".join(repr(float(x)) for x in np.ravel(values)) + '"'


def _open(path: Path, format: str = "extxyz", **options: object) -> Dataset:
    return open_dataset(format, str(path), options=ReadOptions(**options))  # type: ignore[arg-type]


def _strained_copper() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    strain = np.array([[0.03, 0.01, 0.0], [0.01, -0.02, 0.015], [0.0, 0.015, 0.01]])
    atoms.set_cell(atoms.cell @ (np.eye(3) + strain), scale_atoms=True)
    atoms.rattle(0.05, seed=1)
    atoms.calc = EMT()
    return atoms


def _slope(atoms: Atoms) -> np.ndarray:
    """dE/dε of a symmetric strain by central differences, (3, 3) in eV."""
    found, step = np.zeros((3, 3)), 1e-5
    for i in range(3):
        for j in range(3):
            energies = []
            for sign in (1, -1):
                strain = np.zeros((3, 3))
                strain[i, j] += sign * step / 2
                strain[j, i] += sign * step / 2
                other = atoms.copy()
                other.calc = EMT()
                other.set_cell(atoms.cell @ (np.eye(3) + strain), scale_atoms=True)
                energies.append(other.get_potential_energy())
            found[i, j] = (energies[0] - energies[1]) / (2 * step)
    return found


@pytest.mark.parametrize("format", ["extxyz", "traj", "ase_db"])
def test_files_of_ase_give_minus_the_slope_of_the_energy(
    tmp_path: Path, format: str
) -> None:
    atoms = _strained_copper()
    results = {
        "energy": atoms.get_potential_energy(),
        "forces": atoms.get_forces(),
        "stress": atoms.get_stress(),
    }
    kept = atoms.copy()
    kept.calc = SinglePointCalculator(kept, **results)
    path = tmp_path / {"extxyz": "a.xyz", "traj": "a.traj", "ase_db": "a.db"}[format]
    if format == "ase_db":
        connect(str(path)).write(kept)
    else:
        write(path, kept, format=format)
    sample = _open(path, format)[0]
    assert np.abs(sample.virial + _slope(atoms)).max() < 1e-6
    assert np.array_equal(sample.virial, sample.virial.T)
    assert np.abs(sample.virial).max() > 1.0


def test_six_and_nine_numbers_and_both_labels_are_one_virial(tmp_path: Path) -> None:
    virial = -VOLUME * FULL
    headers = [
        f"stress={_words(VOIGT)}",
        f"stress={_words(FULL)}",
        f"virial={_words(virial)}",
        f"virials={_words(virial)}",
        f"virial={_words(virial)} stress={_words(VOIGT)}",
    ]
    for number, header in enumerate(headers):
        dataset = _open(_write(tmp_path / f"{number}.xyz", header))
        assert np.allclose(dataset[0].virial, virial, rtol=1e-12, atol=0)
        assert dataset.label_names(0) == []


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("GPa", units.GPa),
        ("kbar", units.GPa / 10),
        ("MPa", units.GPa / 1000),
        ("bar", units.GPa / 1e4),
        ("eV/Å³", 1.0),
        ("eV/A^3", 1.0),
        ("meV/Å**3", 1e-3),
        ("Hartree/Bohr3", units.Hartree / units.Bohr**3),
    ],
)
def test_units_of_stress(tmp_path: Path, name: str, factor: float) -> None:
    path = _write(tmp_path / "a.xyz", f"stress={_words(FULL / factor)}")
    sample = _open(path, units=Units(stress=name))[0]
    assert np.allclose(sample.virial, -VOLUME * FULL, rtol=1e-10, atol=0)
    assert stress_factor(name) == pytest.approx(factor)


def test_stress_follows_energy_and_length_and_virial_energy(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.xyz", f"virial={_words(FULL)}")
    kcal = units.kcal / units.mol
    sample = _open(path, units=Units(energy="kcal/mol"))[0]
    assert np.allclose(sample.virial, FULL * kcal)
    path = _write(tmp_path / "b.xyz", f"stress={_words(FULL)}")
    sample = _open(path, units=Units(energy="kcal/mol", length="nm"))[0]
    assert np.allclose(sample.virial, -VOLUME * FULL * kcal)


def test_keys_choose_and_none_reads_nothing(tmp_path: Path) -> None:
    mine, virial = f"mine={_words(2 * FULL)}", f"virial={_words(FULL)}"
    path = _write(tmp_path / "a.xyz", f"{mine} {virial} stress={_words(VOIGT)}")
    assert np.allclose(_open(path, virial_key="mine")[0].virial, 2 * FULL)
    assert np.allclose(_open(path, stress_key="mine")[0].virial, -2 * VOLUME * FULL)
    assert np.isnan(_open(path, virial_key="none")[0].virial).all()
    with pytest.raises(DataError, match=r"'virial' and 'stress' have different values"):
        _open(path)


def test_missing_labels_are_nan(tmp_path: Path) -> None:
    for header in ("", f"stress={_words(np.full(6, np.nan))}"):
        assert np.isnan(_open(_write(tmp_path / "a.xyz", header))[0].virial).all()
    zeros = f"stress={_words(np.zeros(6))}"
    molecule = _write(tmp_path / "b.xyz", zeros, cell=False)
    assert np.isnan(_open(molecule)[0].virial).all()
    given = _write(tmp_path / "c.xyz", f"virial={_words(FULL)}", cell=False)
    assert np.allclose(_open(given)[0].virial, FULL)


def test_nearly_symmetric_numbers_are_made_symmetric(tmp_path: Path) -> None:
    crooked = FULL + 1e-6 * np.arange(9).reshape(3, 3)
    sample = _open(_write(tmp_path / "a.xyz", f"virial={_words(crooked)}"))[0]
    assert np.array_equal(sample.virial, (crooked + crooked.T) / 2)


@pytest.mark.parametrize(
    ("header", "cell", "words"),
    [
        (f"virial={_words(VOIGT)} stress={_words(VOIGT)}", True, "different values"),
        (
            f"virial={_words(VOLUME * FULL)} stress={_words(VOIGT)}",
            True,
            "signs of different conventions",
        ),
        (f"stress={_words(np.full(6, 100.0))}", True, "100 eV/Å³, more than any"),
        (f"virial={_words(np.full(6, 1e5))}", False, "5e\\+04 eV per atom"),
        (f"virial={_words(np.arange(9.0))}", True, "not symmetric"),
        (f"stress={_words(VOIGT)}", False, "no periodic cell with a volume"),
        ('stress="1 2 nan 0 0 0"', True, "not finite"),
    ],
)
def test_what_cannot_be_right_is_refused(
    tmp_path: Path, header: str, cell: bool, words: str
) -> None:
    path = _write(tmp_path / "a.xyz", header, cell)
    with pytest.raises(DataError, match=words) as caught:
        _open(path)
    assert str(caught.value).count(". ") == 0
    assert np.isnan(_open(path, virial_key="none")[0].virial).all()


@pytest.mark.parametrize(
    ("value", "words"),
    [("0.1", r"shape \(\), expected 6 or 9"), ("high", "no numbers")],
)
def test_other_values_are_a_label_only_where_a_key_names_them(
    tmp_path: Path, value: str, words: str
) -> None:
    path = _write(tmp_path / "a.xyz", f"stress={value}")
    dataset = _open(path)
    assert np.isnan(dataset[0].virial).all()
    assert dataset.label_names(0) == ["stress"]
    with pytest.raises(DataError, match=words):
        _open(path, stress_key="stress")


def test_splits_without_labels_and_copies_have_no_virial(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.xyz", f"stress={_words(VOIGT)}")
    split = SplitSpec(format="extxyz", path=str(path))
    assert not np.isnan(open_split(split)[0].virial).any()
    unlabelled = split.model_copy(update={"labels": "none"})
    assert np.isnan(open_split(unlabelled)[0].virial).all()
    copies = Rattled(open_split(split), RattleSpec(copies=1, sigma=0.01))
    assert np.isnan(copies[0].virial).all()


def test_the_virial_is_no_part_of_a_structure_checksum(tmp_path: Path) -> None:
    plain = _open(_write(tmp_path / "a.xyz", ""))[0]
    stressed = _open(_write(tmp_path / "b.xyz", f"stress={_words(VOIGT)}"))[0]
    assert plain.structure.checksum == stressed.structure.checksum


@pytest.mark.parametrize("element", ["Si", "Mo", "Li"])
def test_expanded_crystals_of_dft_are_in_tension(element: str) -> None:
    """Mean stress rises with the volume per atom, so it is positive in tension."""
    path = shared_file(f"mlearn_stress/{element}_training.extxyz.gz")
    where = (("group", ("Elastic",)),)
    dataset = open_dataset("extxyz", str(path), options=ReadOptions(where=where))
    samples = [dataset[i] for i in range(len(dataset))]
    cells = np.array([abs(np.linalg.det(s.structure.cell)) for s in samples])
    pressures = np.array([np.trace(s.virial) / 3 for s in samples]) / cells
    per_atom = cells / [len(s.structure) for s in samples]
    assert np.corrcoef(per_atom, -pressures)[0, 1] > 0.5
