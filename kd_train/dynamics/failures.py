"""Signs by which a structure in dynamics is no longer a structure."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from ase import Atoms
from ase.data import chemical_symbols, covalent_radii

from kd_train.dynamics.spec import FailureSpec
from kd_train.dynamics.structures import to_structure
from pipeline.errors import DataError
from pipeline.graphs.closeness import closest_pair
from pipeline.graphs.neighbors import find_pairs

# A bond is no longer than this multiple of the sum of covalent radii.
_BOND = 1.2


class Watch:
    """The checks of a replica that starts from ``start``.

    Positions must not be wrapped into the cell: a bond keeps its periodic image.
    """

    def __init__(self, start: Atoms, spec: FailureSpec, temperature: float) -> None:
        self._structure = to_structure(start)
        self._spec = spec
        self._hottest = None if spec.heat is None else spec.heat * temperature
        numbers = self._structure.atomic_numbers
        radii = covalent_radii[numbers]
        pairs = find_pairs(self._structure, _BOND * 2 * float(radii.max()))
        bonded = pairs.distance < _BOND * (radii[pairs.source] + radii[pairs.target])
        self._bonds = pairs[bonded & (pairs.source <= pairs.target)]

    def energy_fault(self, energies: npt.ArrayLike, temperature: float) -> str | None:
        """Return why energies (eV) or a temperature (K) are impossible, or None."""
        if not (np.isfinite(energies).all() and np.isfinite(temperature)):
            return "an energy or a force is not finite"
        if self._hottest is not None and temperature > self._hottest:
            return (
                f"the temperature is {temperature:.0f} K, above {self._hottest:.0f} K"
            )
        return None

    def position_fault(self, positions: npt.NDArray[np.float64]) -> str | None:
        """Return why ``positions`` (N, 3) in Å are impossible, or None."""
        if not np.isfinite(positions).all():
            return "a position is not finite"
        return self._close(positions) or self._stretched(positions)

    def _close(self, positions: npt.NDArray[np.float64]) -> str | None:
        if self._spec.close is None:
            return None
        structure = replace(self._structure, positions=positions)
        try:
            found = closest_pair(structure, self._spec.close)
        except DataError:
            # Atoms farther apart than any search reaches.
            return "the atoms fly apart"
        if found is None:
            return None
        return f"{self._names(*found.atoms)} are {found.distance:.2f} Å apart"

    def _stretched(self, positions: npt.NDArray[np.float64]) -> str | None:
        if self._spec.stretch is None or not len(self._bonds.source):
            return None
        bonds = self._bonds
        steps = self._bond_vectors(positions)
        ratios = np.linalg.norm(steps, axis=1) / bonds.distance
        worst = int(ratios.argmax())
        if ratios[worst] <= self._spec.stretch:
            return None
        pair = self._names(int(bonds.source[worst]), int(bonds.target[worst]))
        return (
            f"the bond of {pair} is {ratios[worst]:.2f} times as long as at the start"
        )

    def _bond_vectors(
        self, positions: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        bonds = self._bonds
        shifts: npt.NDArray[np.float64] = bonds.shift @ self._structure.cell
        vectors: npt.NDArray[np.float64] = (
            positions[bonds.source] + shifts - positions[bonds.target]
        )
        return vectors

    def _names(self, first: int, second: int) -> str:
        numbers = self._structure.atomic_numbers
        one, other = (f"{a} ({chemical_symbols[numbers[a]]})" for a in (first, second))
        return f"atoms {one} and {other}"
