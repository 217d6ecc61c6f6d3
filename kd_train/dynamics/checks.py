"""Checks of a potential at one structure: work, order of atoms, choice of cell."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from ase import Atoms
from ase.calculators.calculator import Calculator

Floats = npt.NDArray[np.float64]
# A few orders are enough: of a potential that depends on it almost all differ.
_ORDERS = 5
_MEV = 1000.0
# Of a molecule: a shift and a box in Å, without meaning for atoms without images.
_SHIFT = (7.3, -11.9, 5.7)
_BOX = 60.0


def work_error(
    atoms: Atoms, calculator: Calculator, steps: int, displacement: float, seed: int
) -> float:
    """Return the largest |ΔE + ∫F dx| of small random steps, in meV.

    ∫F dx is the trapezoid ½(F₀ + F₁)·Δx. Atoms that are free to move take a random walk
    of ``steps`` from ``atoms``, with standard deviation ``displacement`` (Å) a step
    along each axis.
    """
    random = np.random.default_rng([seed, 1])
    moved = attach(atoms, calculator)
    energy, forces, positions = _state(moved)
    worst = 0.0
    for _ in range(steps):
        step = displacement * random.standard_normal(positions.shape)
        moved.set_positions(positions + step)  # constraints hold fixed atoms
        after, forces_after, positions_after = _state(moved)
        gained = work(positions, positions_after, forces, forces_after)
        worst = largest(worst, abs(after - energy + gained))
        energy, forces, positions = after, forces_after, positions_after
    return _MEV * worst


def work(before: Floats, after: Floats, forces: Floats, forces_after: Floats) -> float:
    """Return the work ½(F₀ + F₁)·Δx of a step in eV; all arrays are (N, 3)."""
    return float(((forces + forces_after) / 2 * (after - before)).sum())


def largest(worst: float, value: float) -> float:
    """Return the larger number; NaN counts as infinite."""
    return max(worst, value if np.isfinite(value) else np.inf)


def order_error(atoms: Atoms, calculator: Calculator, seed: int) -> float:
    """Return the largest change of energy over random orders of the atoms, in meV."""
    random = np.random.default_rng([seed, 2])
    energy = _energy(atoms, calculator)
    worst = 0.0
    for _ in range(_ORDERS):
        other = atoms[random.permutation(len(atoms))]
        worst = largest(worst, abs(_energy(other, calculator) - energy))
    return _MEV * worst


def cell_errors(atoms: Atoms, calculator: Calculator, seed: int) -> dict[str, float]:
    """Return the change of energy in meV by each choice that has no physical meaning.

    Of periodic structures: atoms moved by lattice vectors, atoms wrapped into the cell,
    another basis of the same lattice, and a supercell of two (half its energy). Of
    molecules: a shift of all atoms, and the vectors of a cell without periodicity.
    """
    energy = _energy(atoms, calculator)
    found = {}
    for name, other, factor in _choices(atoms, seed):
        change = abs(_energy(other, calculator) / factor - energy)
        found[name] = _MEV * largest(0.0, change)
    return found


def _choices(atoms: Atoms, seed: int) -> Iterator[tuple[str, Atoms, int]]:
    """Yield a name, the atoms, and how often the energy they have."""
    bare = atoms.copy()
    bare.set_constraint()
    axes = np.flatnonzero(bare.pbc)
    if not len(axes):
        other = bare.copy()
        other.positions += _SHIFT
        yield "shift", other, 1
        other = bare.copy()
        other.set_cell([_BOX] * 3)
        yield "box", other, 1
        return
    random = np.random.default_rng([seed, 3])
    shifts = np.zeros((len(bare), 3))
    shifts[:, axes] = random.integers(-1, 2, (len(bare), len(axes)))
    other = bare.copy()
    other.positions += shifts @ bare.cell.array
    yield "lattice vectors", other, 1
    other = bare.copy()
    other.wrap()
    yield "wrapped", other, 1
    if len(axes) > 1:
        other = bare.copy()
        cell = bare.cell.array.copy()
        cell[axes[1]] += cell[axes[0]]
        other.set_cell(cell, scale_atoms=False)
        yield "basis", other, 1
    repeats = [1, 1, 1]
    repeats[axes[0]] = 2
    yield "supercell", bare.repeat(repeats), 2


def _energy(atoms: Atoms, calculator: Calculator) -> float:
    return float(attach(atoms, calculator).get_potential_energy())


def attach(atoms: Atoms, calculator: Calculator) -> Atoms:
    """Return a copy of ``atoms`` with ``calculator``."""
    copy = atoms.copy()
    copy.calc = calculator
    return copy


def _state(atoms: Atoms) -> tuple[float, Floats, Floats]:
    """Energy in eV, forces and positions (N, 3)."""
    forces = np.array(atoms.get_forces(), np.float64)
    return float(atoms.get_potential_energy()), forces, atoms.get_positions()
