"""Row ranges of samples, cut into pieces that lie in one inner chunk each."""

from dataclasses import dataclass

import numpy as np

from pipeline.fields import Level
from pipeline.store.index import SplitIndex
from pipeline.store.layout import IntArray


@dataclass(frozen=True, eq=False)
class RowSlices:
    """Row ranges to copy, none of which crosses an inner chunk.

    ``number`` (m,) counts inner chunks over the whole axis, ``chunk`` (m,) inside
    their ``blocks``; ``row`` (m,) is the first row in the chunk, ``rows`` their count.
    """

    number: IntArray
    blocks: list[int]
    chunk: IntArray
    row: IntArray
    rows: IntArray
    total: int


def row_slices(
    index: SplitIndex, level: Level, positions: IntArray, chunk_rows: int
) -> RowSlices:
    """Pieces of the samples at ``positions``, for inner chunks of ``chunk_rows``."""
    start, rows = index.spans(level, positions)
    if level == "edge":
        # A sample without edges has no row, not even one to check.
        start, rows = start[rows > 0], rows[rows > 0]
    total = int(rows.sum())
    number, row, rows = _cut(*_join_runs(start, rows), chunk_rows)
    block, chunk = np.divmod(number, index.rows(level) // chunk_rows)
    return RowSlices(number, block.tolist(), chunk, row, rows, total)


def _join_runs(start: IntArray, rows: IntArray) -> tuple[IntArray, IntArray]:
    """Ranges in which neighbours that follow each other are made one."""
    follows = start[1:] == start[:-1] + rows[:-1]
    if not follows.any():
        return start, rows
    first = np.flatnonzero(np.concatenate(([True], ~follows)))
    return start[first], np.add.reduceat(rows, first)


def _cut(
    start: IntArray, rows: IntArray, chunk_rows: int
) -> tuple[IntArray, IntArray, IntArray]:
    """Ranges cut wherever they cross from one inner chunk into the next.

    Returns the number of the chunk, the first row in it and the count of rows.
    """
    number, row = np.divmod(start, chunk_rows)
    if not (row + rows > chunk_rows).any():
        return number, row, rows
    cuts = (row + rows - 1) // chunk_rows + 1
    source = np.repeat(np.arange(len(start)), cuts)
    step = np.arange(len(source)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    number = number[source] + step
    begin = np.maximum(start[source], number * chunk_rows)
    end = np.minimum((start + rows)[source], (number + 1) * chunk_rows)
    return number, begin - number * chunk_rows, end - begin
