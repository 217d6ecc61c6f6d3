"""Ragged samples that can be made again at any time; needs numpy only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]
Indices = npt.NDArray[np.int64]

POOL_ROWS = 16384
# Low bits of the halves' mantissa, so that no two neighbours in a file are equal.
_TAG = 0x3F


@dataclass(frozen=True)
class Column:
    """One array of a sample: a row an atom, or a single row (``per_atom`` False)."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    per_atom: bool = True

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return np.dtype(self.dtype).itemsize * int(np.prod(self.shape, dtype=np.int64))


STRUCTURE = (
    Column("structures/atomic_numbers", (), "uint8"),
    Column("structures/positions", (3,), "float64"),
    Column("labels/energy", (), "float64", per_atom=False),
)


def columns(node_width: int = 256, vector_width: int = 512) -> tuple[Column, ...]:
    """Arrays of a sample; without vector features where ``vector_width`` is 0."""
    features = [Column("features/node_features", (node_width,), "float16")]
    if vector_width:
        vectors = Column("features/vector_features", (3, vector_width), "float16")
        features.append(vectors)
    return (*features, *STRUCTURE)


class Samples:
    """``n`` samples of 40 to 80 atoms whose rows are cut out of a pool of noise.

    ``n_atoms`` (n,) int64. Every sample's halves carry its number in their low bits.
    """

    def __init__(self, n: int, fields: Sequence[Column], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.columns = tuple(fields)
        self.n_atoms: Indices = rng.integers(40, 81, n)
        self._offset = rng.integers(0, POOL_ROWS - 80, n)
        self._energy = rng.standard_normal(n)
        self._pool = {c.path: _noise(c, rng) for c in fields if c.per_atom}

    def __len__(self) -> int:
        return len(self.n_atoms)

    @property
    def n_bytes(self) -> int:
        """Bytes of all samples."""
        return self.bytes_of(np.arange(len(self)))

    def bytes_of(self, indices: Indices) -> int:
        """Bytes of the samples ``indices``."""
        atoms = int(self.n_atoms[indices].sum())
        rows = {True: atoms, False: len(indices)}
        return sum(rows[c.per_atom] * c.row_bytes for c in self.columns)

    def take(self, indices: Indices) -> Arrays:
        """Samples one behind the other: (ΣN, *shape), and (n, *shape) per sample."""
        counts, first = self.n_atoms[indices], self._offset[indices]
        ranges = list(zip(first.tolist(), (first + counts).tolist(), strict=True))
        tags = np.repeat(indices & _TAG, counts).astype(np.uint16)
        taken: Arrays = {}
        for column in self.columns:
            if not column.per_atom:
                taken[column.path] = self._energy[indices]
                continue
            pool = self._pool[column.path]
            rows = np.concatenate([pool[i:j] for i, j in ranges])
            if column.dtype == "float16":
                rows.view(np.uint16)[...] ^= tags.reshape(-1, *(1,) * (rows.ndim - 1))
            taken[column.path] = rows
        return taken

    def parts(self, size: int) -> Iterator[tuple[Indices, Arrays]]:
        """All samples in order, ``size`` at a time, with their numbers."""
        for first in range(0, len(self), size):
            indices = np.arange(first, min(first + size, len(self)))
            yield indices, self.take(indices)


def shuffled_batches(n: int, size: int, limit: int, seed: int) -> list[Indices]:
    """Full batches of a permutation of ``range(n)``, at most ``limit`` of them."""
    order = np.random.default_rng(seed).permutation(n)
    count = min(n // size, limit)
    return list(order[: count * size].reshape(count, size))


def _noise(column: Column, rng: np.random.Generator) -> npt.NDArray[Any]:
    shape = (POOL_ROWS, *column.shape)
    if column.dtype == "uint8":
        return rng.integers(1, 84, shape, np.uint8)
    return rng.standard_normal(shape, np.float32).astype(column.dtype)
