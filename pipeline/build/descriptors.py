"""A short descriptor of every structure of a store, made of its ``node_features``.

For each element of a structure, the features of its atoms are averaged. Channels of
these means are standardised over all structures and reduced to principal directions.
The parts of all elements, each with the element's share of the atoms, are joined and
reduced once more. All covariances are summed up piece by piece.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.build.moments import Floats, Moments, Projection
from pipeline.fields import FIELDS
from pipeline.parallel.ordered_map import Count, Tally
from pipeline.store.layout import IntArray
from pipeline.store.reader import SplitReader

FEATURES = FIELDS["node_features"].path
NUMBERS = FIELDS["atomic_numbers"].path
# Principal directions of each element, and of the whole descriptor: more of them make
# distances alike, and every choice reads all of them.
_PER_ELEMENT = 8
_WIDTH = 32
# Atoms whose features are in memory together, some ten MB of float64.
_PIECE_ATOMS = 1 << 14
PIECE_ROWS = 1 << 13


@dataclass(frozen=True, eq=False)
class Descriptors:
    """Descriptors (n, d) float32 of structures, in a file that is mapped.

    ``variances`` (d,) are those of their independent directions, in descending order.
    """

    rows: npt.NDArray[np.float32]
    variances: Floats


@dataclass(frozen=True, eq=False)
class _ElementMeans:
    """Mean features (g, C) of the atoms of an element in a structure, for g pairs.

    ``structure`` (g,) counts within the piece, ``share`` (g,) is the element's share of
    the atoms.
    """

    structure: IntArray
    element: IntArray
    share: Floats
    means: Floats


def describe_structures(
    splits: Sequence[SplitReader], folder: Path, count: Count
) -> Descriptors:
    """Return descriptors of all structures of ``splits``, in storage order.

    Features are read twice, piece by piece. The descriptors lie in a file without a
    name in ``folder``. ``count`` is called for every piece, with the structures that
    are read.
    """
    total = sum(map(len, splits))
    tally = Tally(count, 2 * total)
    bases = _element_bases(splits, tally)
    starts = np.cumsum([0, *(1 + len(b.variances) for b in bases.values())])
    wide = map_scratch(folder, total, int(starts[-1]))
    moments = Moments(wide.shape[1])
    row = 0
    for split, positions in _pieces(splits):
        part = np.zeros((len(positions), wide.shape[1]))
        found = _element_means(split, positions)
        for start, (element, basis) in zip(starts[:-1], bases.items(), strict=True):
            mine = found.element == element
            columns = np.arange(start + 1, start + 1 + len(basis.variances))
            structures = found.structure[mine]
            part[structures, start] = found.share[mine]
            part[structures[:, None], columns] = basis.apply(found.means[mine])
        wide[row : row + len(part)] = part
        moments.add(part)
        row += len(part)
        tally.add(len(part))
    return _narrow(wide, Projection.of(moments, _WIDTH), folder)


def map_scratch(folder: Path, rows: int, width: int) -> npt.NDArray[np.float32]:
    """Return (rows, width) numbers in a new file in ``folder``, which has no name.

    The file is gone once nothing uses it, however the process ends.

    Raises
    ------
    OSError
        The disk has no room for it.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        # A write to a mapped file without room would end the process.
        os.posix_fallocate(file.fileno(), 0, 4 * rows * width)
        return np.memmap(file, np.float32, "r+", shape=(rows, width))


def _narrow(
    wide: npt.NDArray[np.float32], projection: Projection, folder: Path
) -> Descriptors:
    rows = map_scratch(folder, len(wide), len(projection.variances))
    for first in range(0, len(wide), PIECE_ROWS):
        piece = slice(first, first + PIECE_ROWS)
        rows[piece] = projection.apply(wide[piece].astype(np.float64))
    return Descriptors(rows, projection.variances)


def _element_bases(
    splits: Sequence[SplitReader], tally: Tally
) -> dict[int, Projection]:
    """Return directions of the mean features of every element, by atomic number."""
    moments: dict[int, Moments] = {}
    for split, positions in _pieces(splits):
        found = _element_means(split, positions)
        for element in np.unique(found.element).tolist():
            rows = found.means[found.element == element]
            moments.setdefault(element, Moments(rows.shape[1])).add(rows)
        tally.add(len(positions))
    return {
        element: Projection.standardised(moments[element], _PER_ELEMENT)
        for element in sorted(moments)
    }


def _element_means(split: SplitReader, positions: IntArray) -> _ElementMeans:
    arrays = split.read(positions, [NUMBERS, FEATURES])
    n_atoms = split.n_atoms[positions].astype(np.int64)
    structure = np.repeat(np.arange(len(positions)), n_atoms)
    pairs = structure << 8 | arrays[NUMBERS]
    order = np.argsort(pairs, kind="stable")
    found, first, counts = np.unique(
        pairs[order], return_index=True, return_counts=True
    )
    sums = np.add.reduceat(arrays[FEATURES][order].astype(np.float64), first, axis=0)
    return _ElementMeans(
        structure=found >> 8,
        element=found & 255,
        share=counts / n_atoms[found >> 8],
        means=sums / counts[:, None],
    )


def _pieces(splits: Sequence[SplitReader]) -> Iterator[tuple[SplitReader, IntArray]]:
    """Yield positions of structures that are read together, block after block."""
    for split in splits:
        for block in range(split.n_blocks):
            inside = split.block_positions(block)
            positions = np.arange(inside.start, inside.stop, dtype=np.int64)
            atoms = np.cumsum(split.n_atoms[positions], dtype=np.int64)
            cuts = np.flatnonzero(np.diff(atoms // _PIECE_ATOMS)) + 1
            for piece in np.split(positions, cuts):
                yield split, piece
