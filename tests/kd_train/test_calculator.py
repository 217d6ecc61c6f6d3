"""The calculator of ASE: the numbers of ``kd-eval``, and physics that must hold."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.constraints import FixAtoms
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from kd_train.cli.evaluate import eval_main
from kd_train.evaluation.calculator import StudentCalculator
from pipeline.datasets import open_dataset
from pipeline.errors import CheckpointError, DataError, SpecError
from pipeline.models.checkpoint import save_model
from pipeline.models.normalizer import Normalizer
from pipeline.models.zoo import build_model
from tests.commands import run_command
from tests.frames import DEMO, collision_frames, frame, write_frames
from tests.stores import (
    STUDENTS,
    TINY_PAINN,
    save_gemnet,
    save_teacher,
    teacher_normalizer,
)

TEACHER = DEMO / "painn_teacher.safetensors"


@pytest.fixture(scope="module")
def schnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose forces are gradients, of random weights."""
    torch.manual_seed(11)
    model = build_model("schnet", STUDENTS["schnet-demo"])
    path = tmp_path_factory.mktemp("schnet") / "schnet.safetensors"
    save_model(path, "schnet", model, one_scale(), {})
    return path


def one_scale() -> Normalizer:
    """A normaliser under which forces stay the gradient of the energy."""
    return replace(teacher_normalizer(), energy_std=1.7, force_std=1.7)


@pytest.fixture(scope="module")
def others(schnet: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file of each kind of model."""
    folder = tmp_path_factory.mktemp("others")
    painn = folder / "gradient.safetensors"
    model = build_model("painn", TINY_PAINN | {"direct_forces": False})
    save_model(painn, "painn", model, one_scale(), {})
    gemnet = save_gemnet(folder / "gemnet.safetensors")
    return {"painn": TEACHER, "gradient": painn, "schnet": schnet, "gemnet": gemnet}


def calculator(path: Path, dtype: str = "float64") -> StudentCalculator:
    return StudentCalculator(path, device="cpu", dtype=dtype)


def crystal() -> Atoms:
    """Carbon in a skewed periodic cell, rattled."""
    atoms = bulk("C", "diamond", a=3.6) * (2, 1, 1)
    atoms.rattle(0.05, seed=4)
    return atoms


# These small networks see 20 neighbours, and atoms of a crystal have more.
@pytest.mark.filterwarnings("ignore:.*neighbours within:UserWarning")
@pytest.mark.parametrize("kind", ["painn", "gradient", "schnet", "gemnet"])
def test_gives_what_kd_eval_gives(
    others: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    slab = crystal()
    cell = " ".join(map(str, slab.cell.array.ravel()))
    periodic = frame(
        "slab",
        slab.symbols,
        slab.positions,
        columns={"tags": ("I", [0, 1, 2, 2])},
        header=f'Lattice="{cell}" pbc="T T F"',
    )
    path = write_frames(tmp_path / "a.extxyz", [*collision_frames(5), periodic])
    words = [others[kind], "--data", path, "--device", "cpu", "--out", tmp_path]
    assert run_command(eval_main, words).exit_code == 0
    calc = calculator(others[kind], "float32")
    dataset = open_dataset("extxyz", str(path))
    with np.load(tmp_path / "predictions.npz") as file:
        wanted = dict(file)
    assert wanted["sample_ids"].tolist() == list(dataset.sample_ids)
    forces = np.split(wanted["forces"], np.cumsum(wanted["n_atoms"])[:-1])
    for k, energy in enumerate(wanted["energy"]):
        structure = dataset[k].structure
        atoms = Atoms(
            structure.atomic_numbers,
            structure.positions,
            cell=structure.cell,
            pbc=structure.pbc,
            calculator=calc,
        )
        if structure.pbc.any():
            atoms.set_tags(structure.tags)
        assert atoms.get_potential_energy() == pytest.approx(energy, abs=2e-4)
        assert atoms.get_potential_energy(force_consistent=True) == pytest.approx(
            energy, abs=2e-4
        )
        np.testing.assert_allclose(atoms.get_forces(), forces[k], atol=2e-4)


@pytest.mark.parametrize("kind", ["painn", "gradient", "schnet", "gemnet"])
def test_forces_turn_with_the_atoms(others: dict[str, Path], kind: str) -> None:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=1)
    atoms.calc = calculator(others[kind])
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    matrix, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))
    moved = atoms.copy()
    moved.positions = atoms.positions @ matrix + [3.0, -7.0, 1.0]
    order = np.random.default_rng(3).permutation(len(atoms))
    moved = moved[order]
    moved.calc = atoms.calc
    assert moved.get_potential_energy() == pytest.approx(energy, abs=1e-8)
    np.testing.assert_allclose(moved.get_forces(), (forces @ matrix)[order], atol=1e-8)
    assert np.abs(forces).max() > 1e-3


@pytest.mark.filterwarnings("ignore:.*neighbours within:UserWarning")
@pytest.mark.parametrize("kind", ["gradient", "schnet"])
@pytest.mark.parametrize("periodic", [False, True])
def test_gradient_forces_are_finite_differences(
    others: dict[str, Path], kind: str, periodic: bool
) -> None:
    atoms = crystal() if periodic else molecule("CH3OH")
    atoms.calc = calculator(others[kind])
    forces = atoms.get_forces()
    step = 1e-4
    for atom, axis in ((0, 0), (1, 2), (3, 1)):
        energies = []
        for sign in (1, -1):
            atoms.positions[atom, axis] += sign * step
            energies.append(atoms.get_potential_energy())
            atoms.positions[atom, axis] -= sign * step
        slope = (energies[1] - energies[0]) / (2 * step)
        assert forces[atom, axis] == pytest.approx(slope, abs=1e-6)


def test_a_relaxation_finds_a_molecule() -> None:
    atoms = molecule("CH3OH")
    atoms.rattle(0.1, seed=5)
    atoms.calc = calculator(TEACHER, "float32")
    before = atoms.get_potential_energy()
    assert BFGS(atoms, logfile=None).run(fmax=0.05, steps=60)
    assert atoms.get_potential_energy() < before - 0.1
    # Gas phase: C-O 1.42 Å, O-H 0.96 Å.
    assert atoms.get_distance(0, 1) == pytest.approx(1.42, abs=0.04)
    assert atoms.get_distance(1, 3) == pytest.approx(0.96, abs=0.04)


def test_dynamics_with_gradient_forces_conserve_energy(schnet: Path) -> None:
    atoms = molecule("CH3OH")
    atoms.calc = calculator(schnet)
    BFGS(atoms, logfile=None).run(fmax=0.1, steps=30)
    velocities = np.random.default_rng(6).normal(size=(len(atoms), 3))
    spread = np.sqrt(300 * units.kB * atoms.get_masses())
    atoms.set_momenta(spread[:, None] * velocities)
    start, kinetic = atoms.get_total_energy(), atoms.get_kinetic_energy()
    drifts = []
    dynamics = VelocityVerlet(atoms, timestep=0.25 * units.fs)
    dynamics.attach(lambda: drifts.append(atoms.get_total_energy() - start))
    dynamics.run(100)
    assert kinetic > 0.1
    # A thousandth of the kinetic energy over 25 fs.
    assert np.abs(drifts).max() < 1e-3 * kinetic
    assert atoms.get_kinetic_energy() != pytest.approx(kinetic, rel=0.01)


def test_fixed_atoms_stay() -> None:
    atoms = molecule("CH3OH")
    atoms.rattle(0.1, seed=5)
    atoms.calc = calculator(TEACHER, "float32")
    free = atoms.get_forces()
    atoms.set_constraint(FixAtoms([0, 1]))
    assert not atoms.get_forces()[:2].any()
    np.testing.assert_array_equal(atoms.get_forces(apply_constraint=False), free)
    before = atoms.positions.copy()
    BFGS(atoms, logfile=None).run(fmax=0.05, steps=5)
    np.testing.assert_array_equal(atoms.positions[:2], before[:2])
    assert np.abs(atoms.positions[2:] - before[2:]).max() > 1e-3


def test_results_are_not_stale() -> None:
    atoms = molecule("CH3OH")
    atoms.calc = calculator(TEACHER, "float32")
    first = atoms.get_potential_energy()
    atoms.positions[0, 0] += 0.1
    assert atoms.get_potential_energy() != first
    atoms.positions[0, 0] -= 0.1
    assert atoms.get_potential_energy() == pytest.approx(first, abs=1e-5)


def test_what_cannot_be_calculated_is_told(schnet: Path, tmp_path: Path) -> None:
    calc = calculator(schnet)

    def refused(atoms: Atoms, words: str) -> None:
        atoms.calc = calc
        with pytest.raises(DataError, match=words):
            atoms.get_potential_energy()

    refused(molecule("CH3NO2"), "held no N")
    refused(Atoms("Fm2", [[0, 0, 0], [0, 0, 1.5]]), "atomic number 100")
    refused(Atoms("H2", [[0, 0, 0], [0, 0, np.nan]]), "positions")
    refused(Atoms("H2", [[0, 0, 0], [0, 0, np.inf]]), "positions with numbers that")
    refused(Atoms("H2", [[0, 0, 0], [0, 0, 1]], pbc=True), "cell")
    flat = Atoms("H2", [[0, 0, 0], [0, 0, 1]], cell=[9, 9, 0], pbc=(True, False, True))
    refused(flat, "The cell of a structure of 2 atoms is singular")
    allowed = molecule("CH3NO2")
    allowed.calc = StudentCalculator(schnet, device="cpu", any_element=True)
    assert np.isfinite(allowed.get_potential_energy())
    with pytest.raises(
        CheckpointError, match="does not exist; name a run folder or a model file"
    ):
        StudentCalculator(tmp_path / "absent")
    with pytest.raises(SpecError, match="'float16'"):
        StudentCalculator(schnet, device="cpu", dtype="float16")


def test_periodicity_is_not_ignored(tmp_path: Path) -> None:
    """A5: a student of molecules takes no atoms with a periodic direction."""
    blind = save_teacher(tmp_path / "blind.safetensors", use_pbc=False)
    atoms = molecule("CH3OH", cell=[9, 9, 9], pbc=(True, False, False))
    atoms.calc = calculator(blind)
    with pytest.raises(DataError, match=r"use_pbc: false.*set atoms.pbc = False"):
        atoms.get_potential_energy()
    atoms.pbc = False
    assert np.isfinite(atoms.get_potential_energy())


def test_atoms_that_meet_the_limit_are_told_once(schnet: Path) -> None:
    """A11: with their share."""
    atoms = bulk("C", "diamond", a=3.6)
    atoms.calc = calculator(schnet)
    with pytest.warns(UserWarning, match="100 % of 2 atoms have more than 20 neigh"):
        atoms.get_potential_energy()
    atoms.rattle(0.01, seed=1)
    atoms.get_potential_energy()


def test_energies_of_isolated_atoms(schnet: Path) -> None:
    """C: the references that total energies contain."""
    known = calculator(schnet).reference_energies()
    assert known == {"H": -16.0, "C": -58.0, "O": -106.0}


def test_files_that_do_not_list_elements_are_told(tmp_path: Path) -> None:
    """A8: as files of before are, where no references tell either."""
    path = tmp_path / "bare.safetensors"
    model = build_model("schnet", STUDENTS["schnet-demo"])
    save_model(path, "schnet", model, Normalizer(), {})
    with pytest.warns(UserWarning, match="does not list the elements"):
        calc = calculator(path)
    atoms = molecule("CH3NO2")
    atoms.calc = calc
    assert np.isfinite(atoms.get_potential_energy())


def test_a_lone_atom_is_warned_of_once(schnet: Path) -> None:
    atoms = molecule("H2O") + Atoms("H", [[30, 0, 0]])
    atoms.calc = calculator(schnet)
    with pytest.warns(UserWarning, match=r"Atom 3 \(H\) has no neighbour"):
        atoms.get_potential_energy()
    atoms.positions[0] += 0.01
    atoms.get_potential_energy()


def test_imports_nothing_of_training() -> None:
    code = (
        "import sys, kd_train.evaluation.calculator;"
        "print([m for m in sys.modules if m.startswith('kd_train.')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    training = ("trainer", "loader", "strategies", "losses", "report", "sweep")
    assert not any(f"kd_train.{part}" in done.stdout for part in training)
    assert "kd_train.evaluation.load_student" in done.stdout
