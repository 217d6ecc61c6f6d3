"""Periodic neighbour lists in double precision with a deterministic limit.

Messages flow source j -> target i: ``edge_index[0]`` is j and carries the lattice
shift, ``edge_index[1]`` is i. No torch in here: it runs in loader threads.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from vesin import NeighborList

from pipeline.errors import DataError
from pipeline.structure import Structure

# Atoms closer than this do not see each other, as in the reference models (Å).
_MIN_DISTANCE = 0.01
# Distances that agree to this are one shell of a crystal, so they are tied (Å).
_TIE_WIDTH = 1e-6

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GraphRule:
    """How a model wants its edges built.

    ``cutoff`` in Å, inclusive. ``max_neighbors`` nearest sources are kept per target.
    ``symmetric`` replaces every edge that points down the atom order by the mirror of
    one that points up. ``periodic = False`` ignores the periodic flags.
    """

    cutoff: float
    max_neighbors: int
    symmetric: bool
    periodic: bool = True


@dataclass(frozen=True)
class Edges:
    """Directed edges of one structure, sorted by (target, source, shift).

    ``edge_index`` (2, E) int64 rows source and target; ``cell_offsets`` (E, 3) int64,
    the source image sits at ``positions[source] + cell_offsets @ cell``.
    """

    edge_index: _Ints
    cell_offsets: _Ints

    def __len__(self) -> int:
        return self.edge_index.shape[1]


def neighbor_edges(structure: Structure, rule: GraphRule) -> Edges:
    """Edges of ``structure`` under ``rule``, alike on every machine and in any batch.

    At the neighbour limit, sources of equal distance (to 1e-6 Å) are preferred by
    index, then by shift.
    """
    source, target, shift, distance = _pairs_within(structure, rule)
    keep = (distance <= rule.cutoff) & (distance > _MIN_DISTANCE)
    source, target, shift = source[keep], target[keep], shift[keep]
    kept = _nearest(source, target, shift, distance[keep], rule.max_neighbors)
    if kept is not None:
        source, target, shift = source[kept], target[kept], shift[kept]
    if rule.symmetric:
        source, target, shift = _symmetrised(source, target, shift)
    order = np.lexsort((_shift_code(shift), source, target))
    return Edges(np.stack((source[order], target[order])), shift[order])


def sample_edges(sample_id: str, structure: Structure, rule: GraphRule) -> Edges:
    """:func:`neighbor_edges` of a sample that must have some.

    Raises
    ------
    DataError
        The sample has no neighbours, or a cell that cannot be; names it.
    """
    try:
        edges = neighbor_edges(structure, rule)
    except DataError as error:
        raise DataError(f"Sample {sample_id!r}: {error}") from None
    if len(edges) == 0:
        raise DataError(
            f"Sample {sample_id!r} has no neighbours within {rule.cutoff} Å; remove it "
            "from the dataset and build the store again."
        )
    return edges


def _pairs_within(
    structure: Structure, rule: GraphRule
) -> tuple[_Ints, _Ints, _Ints, _Floats]:
    """Source, target, shift and distance (Å) of all pairs a little past the cutoff."""
    # vesin leaves out pairs at exactly its cutoff, so it gets a slightly larger one.
    finder = NeighborList(
        cutoff=rule.cutoff * (1 + 1e-9) + 1e-9,
        full_list=True,
        algorithm="cell_list",
        n_threads=1,
    )
    periodic = structure.pbc if rule.periodic else np.zeros(3, bool)
    try:
        target, source, shift, distance = finder.compute(
            np.asarray(structure.positions, np.float64),
            np.asarray(structure.cell, np.float64),
            periodic,
            "ijSd",
        )
    except RuntimeError as error:
        raise DataError(
            f"The neighbours of a structure of {len(structure)} atoms cannot be found "
            f"({error}); check its positions, cell and periodic flags."
        ) from error
    return (
        source.astype(np.int64),
        target.astype(np.int64),
        shift.astype(np.int64),
        distance,
    )


def _nearest(
    source: _Ints, target: _Ints, shift: _Ints, distance: _Floats, limit: int
) -> _Ints | None:
    """Positions of the ``limit`` nearest edges of each target; None if all stay."""
    degree = np.bincount(target)
    if not len(target) or degree.max() <= limit:
        return None
    rounded = np.rint(distance / _TIE_WIDTH)
    order = np.lexsort((_shift_code(shift), source, rounded, target))
    first = np.cumsum(degree) - degree
    rank = np.arange(len(order)) - np.repeat(first, degree)
    return order[rank < limit]


def _symmetrised(
    source: _Ints, target: _Ints, shift: _Ints
) -> tuple[_Ints, _Ints, _Ints]:
    """Upward edges (source < target; own images by negative shift) and mirrors."""
    upward = (source < target) | ((source == target) & (_shift_code(shift) < 0))
    source, target, shift = source[upward], target[upward], shift[upward]
    return (
        np.concatenate((source, target)),
        np.concatenate((target, source)),
        np.concatenate((shift, -shift)),
    )


def _shift_code(shift: _Ints) -> _Ints:
    """One integer per shift that sorts lexicographically and is odd in the shift."""
    base = 2 * int(np.abs(shift).max(initial=0)) + 1
    return (shift[:, 0] * base + shift[:, 1]) * base + shift[:, 2]
