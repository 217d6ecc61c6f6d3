"""Finds atoms that lie too close together to be a structure."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from ase.data import chemical_symbols, covalent_radii

from pipeline.errors import DataError
from pipeline.graphs.neighbors import find_pairs
from pipeline.structure import Sample, Structure

# Of so few atoms all pairs are looked at faster than close ones are searched for.
_FEW_ATOMS = 128

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClosePair:
    """Two atoms of a structure that are too close.

    ``atoms`` are their numbers, from 0 on; ``distance`` and the ``radii`` that they
    have together are in Å.
    """

    atoms: tuple[int, int]
    distance: float
    radii: float


def closest_pair(structure: Structure, factor: float) -> ClosePair | None:
    """Return the pair that is closest for its radii, if below ``factor``; else None.

    ``factor`` is of the sum of covalent radii. Periodic images count.

    Raises
    ------
    DataError
        The cell cannot be.
    """
    radii = covalent_radii[structure.atomic_numbers]
    first, second, distance = _candidates(structure, 2 * factor * float(radii.max()))
    together = radii[first] + radii[second]
    close = np.flatnonzero(distance < factor * together)
    if not len(close):
        return None
    worst = close[np.argmin(distance[close] / together[close])]
    atoms = sorted((int(first[worst]), int(second[worst])))
    return ClosePair(
        (atoms[0], atoms[1]), float(distance[worst]), float(together[worst])
    )


def check_distances(sample: Sample, factor: float, remedy: str) -> None:
    """Refuse a sample in which atoms are too close, see `closest_pair`.

    ``remedy`` ends the sentence of the error: what a user can set.

    Raises
    ------
    DataError
        A pair of atoms is closer than ``factor`` times the sum of its covalent radii,
        or the cell cannot be; names the sample and the atoms.
    """
    try:
        found = closest_pair(sample.structure, factor)
    except DataError as error:
        raise DataError(f"Sample {sample.sample_id!r}: {error}") from None
    if found is None:
        return
    numbers = sample.structure.atomic_numbers
    names = [f"{atom} ({chemical_symbols[numbers[atom]]})" for atom in found.atoms]
    pair = f"atoms {names[0]} and {names[1]}, counted from 0, are"
    if found.atoms[0] == found.atoms[1]:
        pair = f"atom {names[0]}, counted from 0, and its periodic image are"
    raise DataError(
        f"Sample {sample.sample_id!r}: {pair} {found.distance:.2g} Å apart, less than "
        f"{factor:g} times the sum of their covalent radii ({found.radii:.2f} Å); "
        f"check the positions and their unit (Å), {remedy}."
    )


def _candidates(structure: Structure, cutoff: float) -> tuple[_Ints, _Ints, _Floats]:
    """All pairs within ``cutoff`` Å: both atoms (P,) and distances (P,) in Å.

    One direction of each pair may be missing.
    """
    if len(structure) <= _FEW_ATOMS:
        squares = _closest_squares(structure, cutoff)
        if squares is not None:
            first, second = np.nonzero(squares < cutoff**2)
            one = first < second
            first, second = first[one], second[one]
            return first, second, np.sqrt(squares[first, second])
    pairs = find_pairs(structure, cutoff)
    return pairs.source, pairs.target, pairs.distance


def _closest_squares(structure: Structure, cutoff: float) -> _Floats | None:
    """Squared distances (N, N) in Å² of the closest images; right up to ``cutoff``.

    None where the cell is too small for one image of each pair to be enough.
    """
    steps = structure.positions.T
    if structure.pbc.any():
        try:
            inverse = np.linalg.inv(structure.cell)
        except np.linalg.LinAlgError:
            return None
        # Columns of the inverse are normals, as long as one over the height.
        narrowest = 1 / np.sqrt(np.square(inverse).sum(axis=0)[structure.pbc].max())
        if not narrowest > 2 * cutoff:
            return None
        steps = (structure.positions @ inverse).T
    between = steps[:, :, None] - steps[:, None, :]
    for axis in np.flatnonzero(structure.pbc):
        between[axis] -= np.rint(between[axis])
    if structure.pbc.any():
        between = (structure.cell.T @ between.reshape(3, -1)).reshape(between.shape)
    squares: _Floats = np.square(between).sum(axis=0)
    return squares
