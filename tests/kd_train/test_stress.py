"""Stress and gradient forces of the calculator: against ASE, in relaxations and NPT."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.filters import FrechetCellFilter
from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT
from ase.optimize import BFGS

from kd_train.evaluation.calculator import StudentCalculator
from pipeline.errors import SpecError
from pipeline.models.checkpoint import save_model
from pipeline.models.normalizer import Normalizer
from pipeline.models.zoo import PRESETS, build_model

REFERENCES = tuple(-3.0 * z if z in (1, 6, 8, 14) else 0.0 for z in range(119))
ONE_SCALE = Normalizer(0.4, 1.7, 1.7, REFERENCES)
TWO_SCALES = Normalizer(0.4, 1.7, 0.6, REFERENCES)
PAINN = PRESETS["painn-small-md"][1] | {
    "hidden_channels": 10,
    "num_layers": 2,
    "num_rbf": 10,
    "cutoff": 3.5,
}
SCHNET = {
    "hidden_channels": 10,
    "num_filters": 10,
    "num_interactions": 2,
    "num_gaussians": 10,
    "cutoff": 3.5,
    "max_neighbors": None,
}
KINDS = {
    "painn": ("painn", PAINN, ONE_SCALE, "model"),
    "schnet": ("schnet", SCHNET, ONE_SCALE, "model"),
    "two-scales": ("schnet", SCHNET, TWO_SCALES, "model"),
    "direct": ("painn", PAINN | {"direct_forces": True}, TWO_SCALES, "gradient"),
}


def make_calculator(
    kind: str, folder: Path, forces: str | None = None
) -> StudentCalculator:
    """Calculator of a student with random weights, in double precision."""
    name, hyperparameters, normalizer, usual = KINDS[kind]
    torch.manual_seed(2)
    model = build_model(name, hyperparameters)
    path = folder / f"{kind}.safetensors"
    save_model(path, name, model, normalizer, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return StudentCalculator(
            path, device="cpu", dtype="float64", forces=forces or usual
        )


def crystal() -> Atoms:
    """Silicon and carbon in a skewed periodic cell, rattled."""
    atoms = bulk("SiC", "zincblende", a=4.4)
    atoms.set_cell(atoms.cell @ [[1.0, 0.03, 0], [0, 1.02, 0.01], [0, 0, 0.98]], True)
    atoms.rattle(0.05, seed=4)
    return atoms


@pytest.mark.filterwarnings("ignore:The student's scales:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_forces_and_stress_are_the_derivatives_that_ase_finds(
    kind: str, tmp_path: Path
) -> None:
    atoms = crystal()
    atoms.calc = make_calculator(kind, tmp_path)
    forces, stress = atoms.get_forces(), atoms.get_stress()
    assert stress.shape == (6,)
    assert np.abs(stress).min() > 1e-5
    numerical = calculate_numerical_stress(atoms, eps=1e-5)
    np.testing.assert_allclose(stress, numerical, rtol=0, atol=1e-8)
    numerical = calculate_numerical_forces(atoms, eps=1e-5)
    np.testing.assert_allclose(forces, numerical, rtol=0, atol=1e-7)
    total = atoms.get_potential_energy()
    assert atoms.get_potential_energies().sum() == pytest.approx(total, abs=1e-9)


def test_stretching_gives_a_positive_stress(tmp_path: Path) -> None:
    """The sign of ASE: the cell contracts where the stress is positive."""
    atoms = crystal()
    atoms.calc = make_calculator("schnet", tmp_path)
    energies = []
    for factor in (0.999, 1.001):
        strained = atoms.copy()
        strained.set_cell(atoms.cell * factor, scale_atoms=True)
        strained.calc = atoms.calc
        energies.append(strained.get_potential_energy())
    trace = atoms.get_stress()[:3].sum()
    assert np.sign(trace) == np.sign(energies[1] - energies[0])


@pytest.mark.parametrize("kind", ["painn", "schnet"])
def test_cells_relax(kind: str, tmp_path: Path) -> None:
    atoms = crystal()
    atoms.calc = make_calculator(kind, tmp_path)
    before = atoms.get_potential_energy()
    start = np.abs(atoms.get_stress()).max()
    with BFGS(FrechetCellFilter(atoms), logfile=None) as optimiser:
        optimiser.run(fmax=1e-4, steps=8)
    assert atoms.get_potential_energy() < before
    assert np.abs(atoms.get_stress()).max() != pytest.approx(start)


@pytest.mark.parametrize("method", [IsotropicMTKNPT, MTKNPT])
def test_constant_pressure_conserves_what_it_should(
    method: type[MTKNPT], tmp_path: Path
) -> None:
    atoms = crystal() * (2, 1, 1)
    atoms.calc = make_calculator("schnet", tmp_path)
    spread = np.sqrt(atoms.get_masses()[:, None] * 300 * units.kB)
    atoms.set_momenta(np.random.default_rng(0).normal(size=(4, 3)) * spread)
    with method(
        atoms,
        timestep=0.25 * units.fs,
        temperature_K=300,
        pressure_au=0.0,
        tdamp=25 * units.fs,
        pdamp=250 * units.fs,
    ) as dynamics:
        before, volume = dynamics.get_conserved_energy(), atoms.get_volume()
        dynamics.run(20)
        after = dynamics.get_conserved_energy()
    assert abs(after - before) / len(atoms) < 1e-4
    assert atoms.get_volume() != volume


def test_stress_of_a_force_head_and_of_molecules_is_refused(tmp_path: Path) -> None:
    calc = make_calculator("direct", tmp_path, "model")
    assert "stress" not in calc.implemented_properties
    atoms = crystal()
    atoms.calc = calc
    direct = atoms.get_forces()
    with pytest.raises(PropertyNotImplementedError, match='forces="gradient"'):
        atoms.get_stress()
    atoms.calc = make_calculator("direct", tmp_path)
    assert "stress" in atoms.calc.implemented_properties
    assert np.abs(atoms.get_forces() - direct).max() > 1e-3
    water = molecule("H2O")
    water.calc = make_calculator("schnet", tmp_path)
    assert water.get_forces().shape == (3, 3)
    with pytest.raises(PropertyNotImplementedError, match="but pbc is F F F"):
        water.get_stress()
    with pytest.raises(SpecError, match="choose one of model, gradient"):
        make_calculator("schnet", tmp_path, "head")


def test_two_scales_are_warned_of_once(tmp_path: Path) -> None:
    atoms = crystal()
    atoms.calc = make_calculator("two-scales", tmp_path)
    with pytest.warns(UserWarning, match="scales of energies"):
        atoms.get_forces()
    atoms.rattle(0.01)
    # Warnings are errors in these tests.
    atoms.get_forces()


@pytest.mark.filterwarnings("ignore:The student's scales:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_isolated_atoms_have_an_energy(kind: str, tmp_path: Path) -> None:
    atom = Atoms("O")
    atom.calc = make_calculator(kind, tmp_path)
    with pytest.warns(UserWarning, match=r"Atom 0 \(O\) has no neighbour"):
        energy = atom.get_potential_energy()
    assert np.isfinite(energy)
    assert atom.get_forces().tolist() == [[0.0, 0.0, 0.0]]
    assert atom.get_potential_energies() == pytest.approx([energy])
