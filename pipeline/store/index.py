"""What is known of a store without its shards: arrays, index, names of files."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import StoreError
from pipeline.fields import EDGE_IDENTITY_FIELDS, FIELDS, Level
from pipeline.store.backends import StorageBackend
from pipeline.store.compressed import CompressedLayout
from pipeline.store.layout import EdgeAxis, IntArray, block_rows
from pipeline.store.quantization import ERROR, SCALE, Quantization
from pipeline.store.shard import RawLayout, ShardLayout

# Stores are written in this version; those of all older ones are read.
# The newest version that is read. Stores are written in the oldest that describes them.
FORMAT_VERSION = 4
_PLAIN_VERSION = 3
# Arrays that a reader of an older version would take for something else.
_NEW_PATHS = {4: {FIELDS["force_jacobian"].path}}
ROOT_KEY = "kd_cache"
SPLITS_KEY = "kd_splits"
SPLIT_KEY = "kd_split"
METADATA = "zarr.json"
DIGESTS = "digests"
COMMIT = "index/commit"
TABLES_GROUP = "encodings"
INDEX_CHUNK = 1 << 20
# What commit records are made with; stores of versions 1 and 2 have BLAKE2b.
BLAKE2B, XXH3 = "blake2b-128", "xxh3-128"
# Path and dtype of the (n,) arrays that say where samples lie.
INDEX_COLUMNS = {
    "index/sample_id": "string",
    "index/start": "int64",
    "index/n_atoms": "int32",
    "index/sample_row": "int64",
    "index/checksum": "uint64",
}
# The same for edges, in splits that have edge-level arrays.
EDGE_COLUMNS = {"edges/start": "int64", "edges/n_edges": "int64"}
# Arrays that every such split has: (2,) uint16 and (3,) int8.
EDGE_IDENTITY = tuple(FIELDS[name] for name in EDGE_IDENTITY_FIELDS)
LEVELS: dict[str, Level] = {"node": "node", "edge": "edge", "sample": "sample"}


@dataclass(frozen=True)
class ArrayInfo:
    """One array of a split: ``shape`` is what follows the axis of its level.

    ``dtype`` is that of the stored numbers, which mean what ``encoding`` says where
    there is one; ``clevel`` is the level of compression of packed arrays.
    """

    path: str
    level: Level
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    encoding: Quantization | None = None
    clevel: int | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))

    @property
    def may_be_nan(self) -> bool:
        """Whether NaN means "no reference label" instead of a failed computation."""
        return self.path.startswith("labels/")

    @property
    def fill(self) -> float | int:
        """Value of the rows that belong to no sample."""
        return np.nan if self.dtype.kind == "f" else 0

    @property
    def scale_arrays(self) -> tuple[str, ...]:
        """Paths of the arrays that belong to this one and have no use without it."""
        if self.encoding is None:
            return ()
        suffixes = (SCALE, ERROR) if self.encoding.has_row_scales else (ERROR,)
        return tuple(self.path + suffix for suffix in suffixes)

    def layout(self, rows: int) -> ShardLayout:
        """Layout of a shard of ``rows`` rows."""
        if self.clevel is None:
            return RawLayout(rows, self.dtype, self.shape)
        return CompressedLayout(rows, self.dtype, self.shape, self.clevel)


@dataclass(frozen=True, eq=False)
class SplitIndex:
    """The plan of one split as read back from an existing store.

    All (n,) arrays run over storage positions; ``sample_ids`` has a string dtype.
    ``edges`` is None in a split without edge-level arrays.
    """

    place: StorageBackend
    name: str
    n_blocks: int
    rows_per_block: int
    samples_per_block: int
    arrays: dict[str, ArrayInfo]
    sample_ids: npt.NDArray[Any]
    start: IntArray
    n_atoms: npt.NDArray[np.int32]
    sample_row: IntArray
    checksums: npt.NDArray[np.uint64]
    edges: EdgeAxis | None = None
    hashing: str = XXH3

    @cached_property
    def fields(self) -> dict[str, ArrayInfo]:
        """Arrays that mean something by themselves, which companions do not."""
        scale_arrays = {c for info in self.arrays.values() for c in info.scale_arrays}
        return {p: info for p, info in self.arrays.items() if p not in scale_arrays}

    @property
    def files(self) -> "SplitFiles":
        """What decides the names of this split's small files."""
        return SplitFiles(
            self.name,
            {path: info.level for path, info in self.arrays.items()},
            table_paths(self.arrays.values()),
            len(self.start),
            self.n_blocks,
        )

    @cached_property
    def block_bounds(self) -> IntArray:
        """(n_blocks + 1,) storage positions between which each block lies."""
        edges = np.arange(self.n_blocks + 1, dtype=np.int64) * self.rows_per_block
        return np.searchsorted(self.start, edges).astype(np.int64)

    def block_positions(self, block: int) -> range:
        """Storage positions of the samples of ``block``."""
        if not 0 <= block < self.n_blocks:
            raise StoreError(
                f"Split {self.name!r} has blocks 0 to {self.n_blocks - 1}, not {block}."
            )
        return range(int(self.block_bounds[block]), int(self.block_bounds[block + 1]))

    def layout(self, path: str) -> ShardLayout:
        """Layout of the shards of array ``path``."""
        info = self.arrays[path]
        return info.layout(self.rows(info.level))

    def rows(self, level: Level) -> int:
        """Rows of one block on the axis of ``level``; 0 for edges that are not kept."""
        return block_rows(
            level, self.rows_per_block, self.samples_per_block, self.edges
        )

    def spans(
        self, level: Level, positions: IntArray | slice
    ) -> tuple[IntArray, IntArray]:
        """First row and count of rows of the samples at ``positions``, (m,) each."""
        if level == "node":
            return self.start[positions], self.n_atoms[positions].astype(np.int64)
        if level == "edge" and self.edges is not None:
            return self.edges.start[positions], self.edges.n_edges[positions]
        rows = self.sample_row[positions]
        return rows, np.ones(len(rows), np.int64)

    def valid_rows(self, level: Level, block: int) -> int:
        """Rows of ``block`` that belong to samples; the rest is fill."""
        positions = self.block_positions(block)
        _, counts = self.spans(level, slice(positions.start, positions.stop))
        return int(counts.sum())

    def shard_name(self, path: str, block: int) -> str:
        """Name of the shard of array ``path`` that belongs to ``block``."""
        key = shard_key(len(self.arrays[path].shape), block)
        return f"{self.name}/{path}/{key}"

    def record_name(self, block: int) -> str:
        """Name of the commit record of ``block``."""
        return f"{self.name}/{commit_key(block)}"

    def find_samples(self, level: Level, begin: int, end: int) -> list[str]:
        """Ids of the samples that own any of the rows ``begin`` to ``end``."""
        start, counts = self.spans(level, slice(None))
        first = np.searchsorted(start + counts, begin, side="right")
        last = np.searchsorted(start, end)
        # A sample without edges owns no row, wherever it starts.
        owners = self.sample_ids[first:last][counts[first:last] > 0]
        return [str(name) for name in owners]


def version_for(paths: Iterable[str]) -> int:
    """Return the format version of a store with arrays at these ``paths``."""
    present = set(paths)
    needed = [version for version, new in _NEW_PATHS.items() if new & present]
    return max(needed, default=_PLAIN_VERSION)


def shard_key(trailing_axes: int, block: int) -> str:
    """Name of a block's shard below its array's folder."""
    return "/".join(["c", str(block), *["0"] * trailing_axes])


def commit_key(block: int) -> str:
    """Place of a block's commit record below its split's folder."""
    return f"{COMMIT}/{shard_key(2, block)}"


def index_chunk(n_samples: int) -> int:
    """Values in one chunk of an index array."""
    return min(n_samples, INDEX_CHUNK)


def index_columns(levels: Iterable[Level]) -> dict[str, str]:
    """Path and dtype of the index arrays of a split with arrays of these levels."""
    return INDEX_COLUMNS | (EDGE_COLUMNS if "edge" in levels else {})


def table_path(array: str, table: str) -> str:
    """Place of a parameter of an encoded array below its split's folder."""
    return f"{TABLES_GROUP}/{array}/{table}"


def table_paths(arrays: Iterable[ArrayInfo]) -> dict[str, int]:
    """Parameters of all encodings by path, with their number of axes."""
    return {
        table_path(info.path, name): table.ndim
        for info in arrays
        if info.encoding is not None
        for name, table in info.encoding.params.items()
    }


@dataclass(frozen=True)
class SplitFiles:
    """What decides the names of a split's files other than shards.

    ``levels`` gives the level of every array, ``tables`` the number of axes of every
    parameter of an encoding.
    """

    split: str
    levels: Mapping[str, Level]
    tables: Mapping[str, int]
    n_samples: int
    n_blocks: int

    def names(self) -> set[str]:
        """All these files, relative to the store."""
        columns = index_columns(self.levels.values())
        nodes = {"", COMMIT}
        for path in (*self.levels, *columns, *self.tables):
            parts = path.split("/")
            nodes.update("/".join(parts[:end]) for end in range(1, len(parts) + 1))
        name = self.split
        files = {f"{name}/{node}/{METADATA}".replace("//", "/") for node in nodes}
        chunks = range(-(-self.n_samples // index_chunk(self.n_samples)))
        files.update(f"{name}/{column}/c/{c}" for column in columns for c in chunks)
        files.update(
            f"{name}/{path}/{shard_key(axes - 1, 0)}"
            for path, axes in self.tables.items()
        )
        files.update(f"{name}/{commit_key(block)}" for block in range(self.n_blocks))
        return files
