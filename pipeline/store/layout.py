"""Pure arithmetic of the store: samples in storage order, packed into blocks."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError, SpecError

INNER_ROWS = 1024

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Where every sample of a split lies; the same input always gives the same plan.

    ``order`` (n,) is the dataset index at each storage position; ``start`` (n,) the
    first row on the atom axis, ``n_atoms`` (n,) int32 and ``sample_row`` (n,) the row
    on the sample axis, all by storage position. Block ``b`` holds the positions
    ``block_bounds[b]`` to ``block_bounds[b + 1]``.
    """

    order: IntArray
    start: IntArray
    n_atoms: npt.NDArray[np.int32]
    sample_row: IntArray
    block_bounds: IntArray
    rows_per_block: int
    samples_per_block: int

    @property
    def n_samples(self) -> int:
        """Number of samples of the split."""
        return len(self.order)

    @property
    def n_blocks(self) -> int:
        """Number of blocks, which is the number of shards of every array."""
        return len(self.block_bounds) - 1

    def rows(self, level: str) -> int:
        """Rows of one block on the ``"node"`` or the ``"sample"`` axis."""
        return self.rows_per_block if level == "node" else self.samples_per_block


def inner_rows(rows_per_shard: int) -> int:
    """Rows of one inner chunk of a shard: 1024, or all of a smaller shard."""
    return min(INNER_ROWS, rows_per_shard)


def plan_blocks(
    n_atoms: npt.ArrayLike, rows_per_block: int, seed: int = 0
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
    start, sample_row, samples_per_block = place_samples(counts, bounds, rows_per_block)
    return BlockPlan(
        order=order,
        start=start,
        n_atoms=counts.astype(np.int32),
        sample_row=sample_row,
        block_bounds=bounds,
        rows_per_block=rows_per_block,
        samples_per_block=samples_per_block,
    )


def storage_order(n_samples: int, seed: int) -> IntArray:
    """(n,) permutation of ``range(n)``: a stable sort by a hash of seed and index.

    A random generator's permutation may change between numpy releases; this order is
    written down in the format and must not.
    """
    stream = _splitmix64(np.array([seed % 2**64], np.uint64))
    keys = _splitmix64(np.arange(n_samples, dtype=np.uint64) + stream)
    return np.argsort(keys, kind="stable").astype(np.int64)


def place_samples(
    counts: IntArray, bounds: IntArray, rows_per_block: int
) -> tuple[IntArray, IntArray, int]:
    """``start`` (n,), ``sample_row`` (n,) and the sample rows of one block.

    Samples lie without gaps from the first row of their block, on both axes.
    """
    sizes = np.diff(bounds)
    block = np.repeat(np.arange(len(sizes)), sizes)
    first = bounds[:-1][block]
    cumulated = np.cumsum(counts) - counts
    start = block * rows_per_block + cumulated - cumulated[first]
    largest = int(sizes.max())
    if largest > INNER_ROWS:
        largest = -(-largest // INNER_ROWS) * INNER_ROWS
    sample_row = block * largest + np.arange(len(counts)) - first
    return start, sample_row, largest


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
            f"{INNER_ROWS} or a multiple of it; try {_nearest_rows(rows_per_block)}."
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
        needed = _nearest_rows(int(counts[largest]))
        raise SpecError(
            f"Sample {largest} of the dataset has {counts[largest]} atoms, more than "
            f"rows_per_block = {rows_per_block}; set it to {needed} or more."
        )


def _nearest_rows(rows: int) -> int:
    if rows <= INNER_ROWS:
        return max(rows, 1)
    return -(-rows // INNER_ROWS) * INNER_ROWS
