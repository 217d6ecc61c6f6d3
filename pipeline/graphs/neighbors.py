"""Periodic neighbour lists in double precision with a deterministic limit.

Messages flow source j -> target i: ``edge_index[0]`` is j and carries the lattice
shift, ``edge_index[1]`` is i. No torch in here: it runs in loader threads.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from vesin import NeighborList

from pipeline.errors import DataError
from pipeline.structure import Structure

# Atoms closer than this do not see each other, as in the reference models (Å).
_MIN_DISTANCE = 0.01
# Distances that agree to this are one shell of a crystal, so they are tied (Å).
_TIE_WIDTH = 1e-6
# A limit that is not strict keeps what lies so little beyond it (Å², or Å in a side
# graph: the released models compare squares in the first and lengths in the second).
_MARGIN = 0.01
# No crystal repeats within so little; a smaller cell is a mistake of units, and would
# have millions of neighbours (Å).
_LOWEST_CELL = 0.5
# Boxes of vesin, and how many of one side have to be left when they become too many.
_MOST_BOXES = 1e5
_FEWEST = 1.3
# Boxes over the open directions of a structure that is periodic in others.
_MOST_OPEN = 5e3

# Names that stores have for fields of `NeighborSpec`.
_STORED_NAMES = {"extra_graphs": "sides"}

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ExtraGraph:
    """A further graph of a model: the base graph cut down to ``cutoff`` and a limit.

    With ``tags``, an edge needs an end (either one) whose tag is among them.
    """

    name: str
    cutoff: float
    max_neighbors: int | None
    tags: tuple[int, ...] | None = None


@dataclass(frozen=True)
class NeighborSpec:
    """How a model wants its edges built.

    ``cutoff`` in Å, inclusive. ``max_neighbors`` nearest sources are kept per target,
    all of them if it is None; without ``strict``, also those hardly farther than the
    first one beyond the limit. ``symmetric`` replaces every edge that points down the
    atom order by the mirror of one that points up. ``periodic = False`` takes molecules
    only: structures with a periodic direction are refused.

    A model of several graphs has ``extra_graphs``. All are cut out of the ``base``
    graph (cutoff, limit), by default the main graph before it is made symmetric.
    """

    cutoff: float
    max_neighbors: int | None
    symmetric: bool
    periodic: bool = True
    strict: bool = True
    base: tuple[float, int | None] | None = None
    extra_graphs: tuple[ExtraGraph, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a store records them, where ``sides`` is a key."""
        values = asdict(self)
        return {_STORED_NAMES.get(name, name): values[name] for name in values}


@dataclass(frozen=True)
class Edges:
    """Directed edges of one structure, sorted by (target, source, shift).

    ``edge_index`` (2, E) int64 rows source and target; ``cell_offsets`` (E, 3) int64,
    the source image sits at ``positions[source] + cell_offsets @ cell``.
    ``extra_graphs`` holds the edges of further graphs by name. ``crowded`` is the
    number of atoms that have more neighbours within the cutoff than the limit lets
    them see.
    """

    edge_index: _Ints
    cell_offsets: _Ints
    extra_graphs: Mapping[str, "Edges"] = field(default_factory=dict)
    crowded: int = 0

    def __len__(self) -> int:
        return self.edge_index.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory of all arrays in bytes."""
        own = self.edge_index.nbytes + self.cell_offsets.nbytes
        return own + sum(side.nbytes for side in self.extra_graphs.values())


def neighbor_edges(structure: Structure, rule: NeighborSpec) -> Edges:
    """Edges of ``structure`` under ``rule``, alike on every machine and in any batch.

    At the neighbour limit, sources of equal distance (to 1e-6 Å) are preferred by
    index, then by shift.

    Raises
    ------
    DataError
        The rule ignores periodicity that the structure has, or the cell cannot be.
    """
    check_periodicity(structure, rule)
    cutoff, limit = rule.base or (rule.cutoff, rule.max_neighbors)
    pairs = find_pairs(structure, cutoff)
    distance = pairs.distance
    pairs = pairs[(distance <= cutoff) & (distance > _MIN_DISTANCE)]
    base = _limit_neighbors(pairs, np.square(pairs.distance), limit, rule.strict)
    whole = (cutoff, limit)
    main = _cut(base, whole, (rule.cutoff, rule.max_neighbors), rule.strict)
    extra_graphs = {}
    for side in rule.extra_graphs:
        cut = _cut(base, whole, (side.cutoff, side.max_neighbors), rule.strict)
        extra_graphs[side.name] = _sort_edges(
            _select_tags(cut, structure.tags, side.tags)
        )
    edges = _sort_edges(_symmetrise(main) if rule.symmetric else main, extra_graphs)
    return replace(edges, crowded=_count_crowded(pairs, rule))


def check_periodicity(structure: Structure, rule: NeighborSpec) -> None:
    """Refuse a structure whose periodicity ``rule`` would ignore.

    Raises
    ------
    DataError
        The structure has a periodic direction, and the rule knows none.
    """
    if not rule.periodic and structure.pbc.any():
        flags = " ".join("T" if flag else "F" for flag in structure.pbc)
        raise DataError(
            f"pbc is {flags}, but the graphs of the model ignore periodic images "
            "(use_pbc: false); choose a model with use_pbc: true, or set "
            "splits.NAME.pbc: none if the structures are molecules in a box."
        )


def limit_warning(rule: NeighborSpec, crowded: int, atoms: int) -> str | None:
    """What to warn of where ``crowded`` of so many atoms met the neighbour limit."""
    if not crowded:
        return None
    share = 100 * crowded / atoms
    return (
        f"{share:.3g} % of {atoms} atoms have more than {rule.max_neighbors} "
        f"neighbours within {rule.cutoff:g} Å, the limit of the model "
        "(max_neighbors), which does not see the others; its energies may jump, and "
        "in perfect crystals they depend on the choice of cell and the order of atoms"
    )


def sample_edges(sample_id: str, structure: Structure, rule: NeighborSpec) -> Edges:
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


@dataclass(frozen=True)
class _Pairs:
    """Source, target, shift and distance (Å) of directed pairs."""

    source: _Ints
    target: _Ints
    shift: _Ints
    distance: _Floats

    def __getitem__(self, chosen: npt.NDArray[Any]) -> "_Pairs":
        return _Pairs(
            self.source[chosen],
            self.target[chosen],
            self.shift[chosen],
            self.distance[chosen],
        )


def find_pairs(structure: Structure, cutoff: float) -> _Pairs:
    """All pairs up to a little past the cutoff (Å), in both directions.

    Raises
    ------
    DataError
        The cell cannot be, or the neighbours cannot be found.
    """
    check_cell(structure)
    _check_spread(structure, cutoff)
    # vesin leaves out pairs at exactly its cutoff, so it gets a slightly larger one.
    finder = NeighborList(
        cutoff=cutoff * (1 + 1e-9) + 1e-9,
        full_list=True,
        algorithm="cell_list",
        n_threads=1,
    )
    try:
        target, source, shift, distance = finder.compute(
            np.asarray(structure.positions, np.float64),
            np.asarray(structure.cell, np.float64),
            structure.pbc,
            "ijSd",
        )
    except RuntimeError as error:
        raise DataError(
            f"The neighbours of a structure of {len(structure)} atoms cannot be found "
            f"({error}); check its positions, cell and periodic flags."
        ) from error
    return _Pairs(
        source.astype(np.int64),
        target.astype(np.int64),
        shift.astype(np.int64),
        distance,
    )


def _check_spread(structure: Structure, cutoff: float) -> None:
    """Refuse structures that reach so far that vesin would crash or take forever.

    It sorts atoms into at most 10⁵ boxes, one per cutoff. Beyond, all three sides get
    fewer of them, and if one is left without any it divides by zero, which ends the
    process. Where only some directions are periodic, far open ones take minutes.
    """
    boxes = np.clip(_sides(structure) / cutoff, 1.0, 1e100)
    total = float(np.prod(boxes))
    left = float(boxes.min()) * (_MOST_BOXES / total) ** (1 / 3)
    mixed = structure.pbc.any() and not structure.pbc.all()
    slow = mixed and float(np.prod(boxes[~structure.pbc])) > _MOST_OPEN
    empty = 2 * total > _MOST_BOXES and left < _FEWEST
    if slow or empty or boxes.max() > _MOST_BOXES:
        raise DataError(
            f"A structure of {len(structure)} atoms reaches over "
            f"{boxes.max() * cutoff:.4g} Å, too far for its few neighbours to be "
            "found; check its positions and cell, and their unit (Å)."
        )


def _sides(structure: Structure) -> _Floats:
    """(3,) how far a structure reaches: its cell, or its atoms where not periodic."""
    with np.errstate(over="ignore"):
        reach = np.ptp(np.asarray(structure.positions, np.float64), axis=0)
    cell = np.asarray(structure.cell, np.float64)
    if structure.pbc.all():
        # Distances between opposite faces.
        return np.asarray(1 / np.linalg.norm(np.linalg.inv(cell), axis=0))
    return np.where(structure.pbc, np.linalg.norm(cell, axis=1), reach)


def check_cell(structure: Structure) -> None:
    """Refuse a cell without height along one of its periodic vectors.

    Raises
    ------
    DataError
        Vectors are missing, parallel, or closer than 0.5 Å to each other's planes.
    """
    if not structure.pbc.any():
        return
    vectors = np.asarray(structure.cell, np.float64)[structure.pbc]
    height = _lowest_height(vectors)
    if height < _LOWEST_CELL:
        raise DataError(
            f"The cell of a structure of {len(structure)} atoms is singular or only "
            f"{height:.2g} Å high in a periodic direction; check its vectors, their "
            "unit (Å) and the periodic flags."
        )


def _lowest_height(vectors: _Floats) -> float:
    """Smallest height (Å) of the cell of (k, 3) vectors; 0 where it has none."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(lengths).all() and lengths.all()):
        return 0.0
    unit = vectors / lengths
    try:
        # Heights of a cell of unit vectors, squared, are one over this diagonal.
        inverse = np.linalg.inv(unit @ unit.T).diagonal()
    except np.linalg.LinAlgError:
        return 0.0
    if not inverse.min() > 0:
        return 0.0
    return float((lengths[:, 0] / np.sqrt(inverse)).min())


def _count_crowded(pairs: _Pairs, rule: NeighborSpec) -> int:
    """Atoms with more sources within the cutoff of the main graph than its limit."""
    if rule.max_neighbors is None:
        return 0
    targets = pairs.target
    if rule.base is not None:
        targets = targets[pairs.distance <= rule.cutoff]
    return int((np.bincount(targets) > rule.max_neighbors).sum())


def _cut(
    base: _Pairs,
    whole: tuple[float, int | None],
    wanted: tuple[float, int | None],
    strict: bool,
) -> _Pairs:
    """Return ``base``, whose rule is ``whole``, under the smaller rule ``wanted``."""
    cutoff, limit = wanted
    if cutoff != whole[0]:
        base = base[base.distance <= cutoff]
    if limit == whole[1]:
        return base
    return _limit_neighbors(base, base.distance, limit, strict)


def _limit_neighbors(
    pairs: _Pairs, value: _Floats, limit: int | None, strict: bool
) -> _Pairs:
    """The pairs with the ``limit`` smallest values of each target."""
    if limit is None:
        return pairs
    degree = np.bincount(pairs.target)
    if not len(value) or degree.max() <= limit:
        return pairs
    rounded = np.rint(pairs.distance / _TIE_WIDTH)
    order = np.lexsort((_shift_code(pairs.shift), pairs.source, rounded, pairs.target))
    first = np.cumsum(degree) - degree
    if strict:
        rank = np.arange(len(order)) - np.repeat(first, degree)
        return pairs[order[rank < limit]]
    highest = np.full(len(degree), np.inf)
    crowded = degree > limit
    highest[crowded] = value[order[first[crowded] + limit]] + _MARGIN
    return pairs[value <= highest[pairs.target]]


def _select_tags(
    pairs: _Pairs, tags: npt.NDArray[np.int8], wanted: tuple[int, ...] | None
) -> _Pairs:
    """The pairs of which either end has one of the ``wanted`` tags."""
    if wanted is None:
        return pairs
    chosen = np.isin(tags, wanted)
    return pairs[chosen[pairs.source] | chosen[pairs.target]]


def _symmetrise(pairs: _Pairs) -> _Pairs:
    """Upward edges (source < target; own images by negative shift) and mirrors."""
    own = pairs.source == pairs.target
    up = pairs[(pairs.source < pairs.target) | (own & (_shift_code(pairs.shift) < 0))]
    return _Pairs(
        np.concatenate((up.source, up.target)),
        np.concatenate((up.target, up.source)),
        np.concatenate((up.shift, -up.shift)),
        np.concatenate((up.distance, up.distance)),
    )


def _sort_edges(
    pairs: _Pairs, extra_graphs: Mapping[str, Edges] | None = None
) -> Edges:
    order = np.lexsort((_shift_code(pairs.shift), pairs.source, pairs.target))
    index = np.stack((pairs.source[order], pairs.target[order]))
    return Edges(index, pairs.shift[order], extra_graphs or {})


def _shift_code(shift: _Ints) -> _Ints:
    """One integer per shift that sorts lexicographically and is odd in the shift."""
    base = 2 * int(np.abs(shift).max(initial=0)) + 1
    return (shift[:, 0] * base + shift[:, 1]) * base + shift[:, 2]
