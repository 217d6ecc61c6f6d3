"""Pure arithmetic of the store: samples in storage order, packed into blocks."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError, SpecError
from pipeline.fields import Level

INNER_ROWS = 1024

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class EdgeAxis:
    """Where every sample's edges lie on the edge axis, all by storage position.

    ``start`` (n,) is the first row and ``n_edges`` (n,) the count, which may be 0;
    every block has ``rows_per_block`` rows on this axis.
    """

    start: IntArray
    n_edges: IntArray
    rows_per_block: int


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Where every sample of a split lies; the same input always gives the same plan.

    ``order`` (n,) is the dataset index at each storage position; ``start`` (n,) the
    first row on the atom axis, ``n_atoms`` (n,) int32 and ``sample_row`` (n,) the row
    on the sample axis, all by storage position. Block ``b`` holds the positions
    ``block_bounds[b]`` to ``block_bounds[b + 1]``. ``edges`` is None in a split without
    edge-level arrays.
    """

    order: IntArray
    start: IntArray
    n_atoms: npt.NDArray[np.int32]
    sample_row: IntArray
    block_bounds: IntArray
    rows_per_block: int
    samples_per_block: int
    edges: EdgeAxis | None = None

    @property
    def n_samples(self) -> int:
        """Number of samples of the split."""
        return len(self.order)

    @property
    def n_blocks(self) -> int:
        """Number of blocks, which is the number of shards of every array."""
        return len(self.block_bounds) - 1

    def rows(self, level: Level) -> int:
        """Rows of one block on the axis of ``level``; 0 for edges that are not kept."""
        return block_rows(
            level, self.rows_per_block, self.samples_per_block, self.edges
        )


def block_rows(
    level: Level, node_rows: int, sample_rows: int, edges: EdgeAxis | None
) -> int:
    """Rows of one block on the axis of ``level``; 0 for edges that are not kept."""
    edge_rows = 0 if edges is None else edges.rows_per_block
    return {"node": node_rows, "sample": sample_rows, "edge": edge_rows}[level]


def inner_rows(rows_per_shard: int) -> int:
    """Rows of one inner chunk of a shard: 1024, or all of a smaller shard."""
    return min(INNER_ROWS, rows_per_shard)


def whole_chunks(rows: int) -> int:
    """Smallest shard for ``rows`` rows: one chunk up to 1024, else whole chunks."""
    if rows <= INNER_ROWS:
        return max(rows, 1)
    return -(-rows // INNER_ROWS) * INNER_ROWS


def plan_blocks(
    n_atoms: npt.ArrayLike,
    rows_per_block: int,
    seed: int = 0,
    n_edges: npt.ArrayLike | None = None,
) -> BlockPlan:
    """Plan in which samples lie in seeded random order and never cross a block.

    Parameters
    ----------
    n_atoms
        (n,) atoms of every sample in dataset order.
    rows_per_block
        Rows of a block on the atom axis: a multiple of 1024, or any smaller number.
    seed
        Decides the storage order; the same seed gives the same order everywhere.
    n_edges
        (n,) edges of every sample in dataset order, where edge-level arrays are kept.
        They have no say in which samples share a block.

    Raises
    ------
    SpecError
        When ``rows_per_block`` is unusable or too small for a sample.
    DataError
        When there are no samples or one has no atoms.
    """
    counts = np.asarray(n_atoms, dtype=np.int64)
    _check_counts(counts, rows_per_block)
    order = storage_order(len(counts), seed)
    counts = counts[order]
    bounds = _pack(counts, rows_per_block)
    sample_row, samples_per_block = place_samples(bounds)
    edges = None
    if n_edges is not None:
        edges = plan_edges(np.asarray(n_edges, np.int64)[order], bounds)
    return BlockPlan(
        order=order,
        start=place_rows(counts, bounds, rows_per_block),
        n_atoms=counts.astype(np.int32),
        sample_row=sample_row,
        block_bounds=bounds,
        rows_per_block=rows_per_block,
        samples_per_block=samples_per_block,
        edges=edges,
    )


def storage_order(n_samples: int, seed: int) -> IntArray:
    """(n,) permutation of ``range(n)``: a stable sort by a hash of seed and index.

    A random generator's permutation may change between numpy releases; this order is
    written down in the format and must not.
    """
    stream = _splitmix64(np.array([seed % 2**64], np.uint64))
    keys = _splitmix64(np.arange(n_samples, dtype=np.uint64) + stream)
    return np.argsort(keys, kind="stable").astype(np.int64)


def place_rows(counts: IntArray, bounds: IntArray, rows_per_block: int) -> IntArray:
    """``start`` (n,) of samples of ``counts`` (n,) rows, by storage position.

    Samples lie without gaps from the first row of their block.
    """
    sizes = np.diff(bounds)
    block = np.repeat(np.arange(len(sizes)), sizes)
    cumulated = np.cumsum(counts) - counts
    return block * rows_per_block + cumulated - cumulated[bounds[:-1][block]]


def place_samples(bounds: IntArray) -> tuple[IntArray, int]:
    """``sample_row`` (n,) and the sample rows of one block."""
    sizes = np.diff(bounds)
    per_block = whole_chunks(int(sizes.max()))
    block = np.repeat(np.arange(len(sizes)), sizes)
    return block * per_block + np.arange(len(block)) - bounds[:-1][block], per_block


def plan_edges(n_edges: IntArray, bounds: IntArray) -> EdgeAxis:
    """Edge axis for ``n_edges`` (n,) by storage position, blocks as wide as needed."""
    rows = whole_chunks(int(np.add.reduceat(n_edges, bounds[:-1]).max()))
    return EdgeAxis(place_rows(n_edges, bounds, rows), n_edges, rows)


def _splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _pack(counts: IntArray, rows_per_block: int) -> IntArray:
    ends = np.cumsum(counts)
    bounds = [0]
    while bounds[-1] < len(counts):
        used = ends[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(int(np.searchsorted(ends, used + rows_per_block, side="right")))
    return np.array(bounds, np.int64)


def _check_counts(counts: IntArray, rows_per_block: int) -> None:
    if rows_per_block < 1 or rows_per_block % inner_rows(rows_per_block):
        raise SpecError(
            f"rows_per_block is {rows_per_block} but must be a positive number up to "
            f"{INNER_ROWS} or a multiple of it; try {whole_chunks(rows_per_block)}."
        )
    if not len(counts):
        raise DataError(
            "The dataset has no samples, so there is nothing to store; check its path "
            "and limit."
        )
    if counts.min() < 1:
        raise DataError(
            f"Sample {int(counts.argmin())} of the dataset has no atoms; remove it."
        )
    largest = int(counts.argmax())
    if counts[largest] > rows_per_block:
        needed = whole_chunks(int(counts[largest]))
        raise SpecError(
            f"Sample {largest} of the dataset has {counts[largest]} atoms, more than "
            f"rows_per_block = {rows_per_block}; set it to {needed} or more."
        )
