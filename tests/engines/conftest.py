"""A tiny student, two structures, and ASE as the reference of every engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from kd_train.evaluation.potential import Evaluation, StudentPotential
from pipeline.models.checkpoint import save_model
from pipeline.models.zoo import build_model
from tests.frames import DEMO
from tests.stores import TINY_PAINN, teacher_normalizer

# Two scales, as of a teacher with a force head: forces must follow that of energies.
SMOOTH = {"direct_forces": False, "max_neighbors": 10_000}
CELL = [[5.6, 0.0, 0.0], [1.1, 5.2, 0.0], [-0.7, 0.9, 5.0]]
FORCES = {"forces": "gradient"}


def save_student(path: Path, **changes: Any) -> Path:
    """Save an untrained PaiNN with gradient forces and no limit that is reached."""
    torch.manual_seed(7)
    model = build_model("painn", TINY_PAINN | SMOOTH | changes)
    save_model(path, "painn", model, teacher_normalizer(), {"made": "for tests"})
    return path


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tmp_path_factory.mktemp("engines") / "student.safetensors")


@pytest.fixture(scope="session")
def potential(student: Path) -> StudentPotential:
    return StudentPotential(student, device="cpu", forces="gradient")


@pytest.fixture(scope="session")
def trained() -> StudentPotential:
    """A network that knows molecules, whose head of forces is left out."""
    path = DEMO / "painn_teacher.safetensors"
    return StudentPotential(path, device="cpu", forces="gradient")


@pytest.fixture(scope="session")
def warm_methanol(trained: StudentPotential) -> Atoms:
    """Methanol at its minimum, with the velocities of 300 K; tests copy it."""
    atoms = molecule("CH3OH")
    atoms.calc = Reference(trained)
    assert BFGS(atoms, logfile=None).run(fmax=0.05, steps=40)
    atoms.calc = None
    atoms.positions += [12.0, 12.0, 12.0]
    warm(atoms)
    return atoms


@pytest.fixture(scope="session")
def drift(warm_methanol: Atoms, trained: StudentPotential) -> np.ndarray:
    """Total energy minus its start (eV) after each of 200 steps of 0.25 fs in ASE."""
    atoms = warm_methanol.copy()
    atoms.calc = Reference(trained)
    totals = np.array(total_energies(atoms, 200, 0.25))
    drift: np.ndarray = totals - totals[0]
    # Kinetic energy is 0.2 eV, and forces that are not a gradient lose 0.05 eV.
    assert np.abs(drift).max() < 2e-3
    return drift


@pytest.fixture
def box() -> Atoms:
    """Two molecules in a skew cell smaller than the cutoff, images across its faces."""
    atoms = molecule("CH3OH") + molecule("H2O")
    atoms.positions[6:] += [2.4, 2.2, 1.5]
    atoms.set_cell(CELL)
    atoms.pbc = True
    atoms.rattle(0.03, seed=2)
    return atoms


@pytest.fixture
def free() -> Atoms:
    """A molecule, away from the origin."""
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.03, seed=3)
    atoms.positions += [12.0, 12.0, 12.0]
    return atoms


def evaluate(potential: StudentPotential, atoms: Atoms) -> Evaluation:
    return potential.evaluate(
        atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc
    )


class Reference(Calculator):
    """Calculator of ASE around a potential, for dynamics to compare with."""

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012

    def __init__(self, potential: StudentPotential) -> None:
        super().__init__()
        self.potential = potential

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        result = evaluate(self.potential, self.atoms)
        self.results = {"energy": result.energy, "forces": result.forces}
        if result.stress is not None:
            voigt = result.stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
            self.results["stress"] = voigt


def warm(atoms: Atoms, kelvin: float = 300.0) -> None:
    """Set momenta of a temperature, without motion of the centre of mass."""
    spread = np.sqrt(kelvin * units.kB * atoms.get_masses())[:, None]
    momenta = spread * np.random.default_rng(6).normal(size=(len(atoms), 3))
    velocities = momenta / atoms.get_masses()[:, None]
    drift = momenta.sum(axis=0) / atoms.get_masses().sum()
    atoms.set_velocities(velocities - drift)


def total_energies(atoms: Atoms, steps: int, femtoseconds: float) -> list[float]:
    """Total energies (eV) of a run of velocity Verlet in ASE, start included."""
    totals: list[float] = []
    dynamics = VelocityVerlet(atoms, timestep=femtoseconds * units.fs)
    dynamics.attach(lambda: totals.append(atoms.get_total_energy()))
    dynamics.run(steps)
    return totals
