"""What is known of a store without its shards: root, splits, index arrays, file names.

Shared by writer, reader and verification; holds all reading of metadata.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numcodecs.vlen import VLenUTF8

from pipeline.errors import DamagedStoreError, StoreError
from pipeline.fields import EDGE_IDENTITY_FIELDS, FIELDS, Level
from pipeline.store.layout import EdgeAxis, IntArray, block_rows
from pipeline.store.shard import ShardLayout, without_crc

# A store is written under the lowest version that has what it holds.
FORMAT_VERSION = 1
EDGE_FORMAT_VERSION = 2
NEWEST_FORMAT_VERSION = EDGE_FORMAT_VERSION
ROOT_KEY = "kd_cache"
SPLITS_KEY = "kd_splits"
SPLIT_KEY = "kd_split"
METADATA = "zarr.json"
DIGESTS = "digests"
COMMIT = "index/commit"
INDEX_CHUNK = 1 << 20
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
    """One array of a split: ``shape`` is what follows the axis of its level."""

    path: str
    level: Level
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

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


@dataclass(frozen=True, eq=False)
class SplitIndex:
    """The plan of one split as read back from an existing store.

    All (n,) arrays run over storage positions; ``sample_ids`` has a string dtype.
    ``edges`` is None in a split without edge-level arrays.
    """

    store: Path
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

    @property
    def levels(self) -> dict[str, Level]:
        """Level of every array by its path."""
        return {path: info.level for path, info in self.arrays.items()}

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
        """Sizes of the shards of array ``path``."""
        info = self.arrays[path]
        return ShardLayout(self.rows(info.level), info.row_bytes)

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

    def shard_file(self, path: str, block: int) -> Path:
        """Place of the shard of array ``path`` that belongs to ``block``."""
        key = shard_key(len(self.arrays[path].shape), block)
        return self.store / self.name / path / key

    def samples_at(self, level: Level, begin: int, end: int) -> list[str]:
        """Ids of the samples that own any of the rows ``begin`` to ``end``."""
        start, counts = self.spans(level, slice(None))
        first = np.searchsorted(start + counts, begin, side="right")
        last = np.searchsorted(start, end)
        # A sample without edges owns no row, wherever it starts.
        owners = self.sample_ids[first:last][counts[first:last] > 0]
        return [str(name) for name in owners]


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


def format_version(levels: Iterable[Level]) -> int:
    """Lowest version of the format that has arrays of these levels."""
    return EDGE_FORMAT_VERSION if "edge" in levels else FORMAT_VERSION


def split_files(
    name: str, levels: Mapping[str, Level], n_samples: int, n_blocks: int
) -> set[str]:
    """Files of a split other than shards; ``levels`` gives the level of every array."""
    columns = index_columns(levels.values())
    nodes = {"", COMMIT}
    for path in (*levels, *columns):
        parts = path.split("/")
        nodes.update("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    files = {f"{name}/{node}/{METADATA}".replace("//", "/") for node in nodes}
    chunks = range(-(-n_samples // index_chunk(n_samples)))
    files.update(f"{name}/{column}/c/{c}" for column in columns for c in chunks)
    files.update(f"{name}/{commit_key(block)}" for block in range(n_blocks))
    return files


def read_root(store: Path) -> dict[str, Any]:
    """Attributes of the root group, checked to be those of a readable feature store."""
    if not (store / METADATA).is_file():
        raise StoreError(
            f"{store} is not a feature store, it has no {METADATA}; make one with "
            "`kd-cache build SPEC`."
        )
    attributes = read_attributes(store / METADATA)
    header = attributes.get(ROOT_KEY)
    if not isinstance(header, dict):
        raise StoreError(
            f"{store} is a Zarr group but not a feature store: its attributes lack "
            f"{ROOT_KEY!r}; give the path that `kd-cache build` wrote."
        )
    version = header.get("format_version")
    if isinstance(version, int) and version > NEWEST_FORMAT_VERSION:
        raise StoreError(
            f"{store} has format version {version} and this program reads up to "
            f"{NEWEST_FORMAT_VERSION}; update kd-train or build the store again."
        )
    names = attributes.get(SPLITS_KEY)
    known = version in (FORMAT_VERSION, EDGE_FORMAT_VERSION)
    sound = known and isinstance(header.get("complete"), bool)
    if not sound or not isinstance(names, list):
        raise damaged(store / METADATA, "lacks its version, state or splits")
    return attributes


def read_attributes(file: Path) -> dict[str, Any]:
    """Attributes in a ``zarr.json``."""
    attributes = read_json(file).get("attributes")
    if not isinstance(attributes, dict):
        raise damaged(file, "has no attributes")
    return attributes


def read_json(file: Path) -> dict[str, Any]:
    """JSON object in ``file``; a missing or unreadable one is a damaged store."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise damaged(file, "is missing") from None
    except ValueError:
        raise damaged(file, "is not readable as JSON") from None
    if not isinstance(content, dict):
        raise damaged(file, "is not a JSON object")
    return content


def damaged(file: Path, what: str) -> DamagedStoreError:
    """Error for a file that cannot be rebuilt from the teacher alone."""
    return DamagedStoreError(
        f"{file} {what}; restore it from a copy or build the store again."
    )


def read_split(store: Path, name: str) -> SplitIndex:
    """Plan of split ``name``, whose parts are checked to fit together."""
    file = store / name / METADATA
    plan: Any = read_attributes(file).get(SPLIT_KEY)
    try:
        numbers = {
            key: int(plan[key])
            for key in ("n_blocks", "rows_per_block", "samples_per_block")
        }
        n_samples = int(plan["n_samples"])
        levels = {str(item["path"]): LEVELS[item["level"]] for item in plan["arrays"]}
        totals = {"index/n_atoms": int(plan["n_atoms"])}
        if "edge" in levels.values():
            totals["edges/n_edges"] = int(plan["n_edges"])
            numbers["edge_rows_per_block"] = int(plan["edge_rows_per_block"])
    except (TypeError, KeyError, ValueError):
        raise damaged(file, f"lacks a usable {SPLIT_KEY!r}") from None
    columns = {
        path: _read_column(store / name, path, dtype, n_samples)
        for path, dtype in index_columns(levels.values()).items()
    }
    for path, total in totals.items():
        if int(columns[path].sum(dtype=np.int64)) != total:
            what = path.partition("/n_")[2]
            raise damaged(
                file, f"says {total} {what}, which is not the sum of its counts"
            )
    return _split_index(store, name, numbers, levels, columns)


def _split_index(
    store: Path,
    name: str,
    numbers: dict[str, int],
    levels: dict[str, Level],
    columns: dict[str, npt.NDArray[Any]],
) -> SplitIndex:
    edge_rows = numbers.pop("edge_rows_per_block", None)
    edges = None
    if edge_rows is not None:
        edges = EdgeAxis(columns["edges/start"], columns["edges/n_edges"], edge_rows)
    n_blocks = numbers["n_blocks"]
    sizes = numbers["rows_per_block"], numbers["samples_per_block"], edges
    arrays = {
        path: _read_array_info(
            store / name, path, level, block_rows(level, *sizes), n_blocks
        )
        for path, level in levels.items()
    }
    for field in () if edges is None else EDGE_IDENTITY:
        info = arrays.get(field.path)
        if info is None or (info.shape, info.dtype) != (field.shape, field.dtype):
            file = store / name / METADATA
            raise damaged(file, f"plans edge arrays without a usable {field.path!r}")
    return SplitIndex(
        store=store,
        name=name,
        **numbers,
        arrays=arrays,
        sample_ids=columns["index/sample_id"],
        start=columns["index/start"],
        n_atoms=columns["index/n_atoms"],
        sample_row=columns["index/sample_row"],
        checksums=columns["index/checksum"],
        edges=edges,
    )


def _read_array_info(
    split: Path, path: str, level: Level, rows: int, n_blocks: int
) -> ArrayInfo:
    file = split / path / METADATA
    document = read_json(file)
    try:
        shape = [int(size) for size in document["shape"]]
        shard = document["chunk_grid"]["configuration"]["chunk_shape"]
        (codec,) = document["codecs"]
        inner = codec["configuration"]
        dtype = np.dtype(document["data_type"])
        codecs = [entry["name"] for entry in inner["codecs"]]
        trailing = tuple(shape[1:])
        layout = ShardLayout(rows, 1)
        sound = (
            shape == [n_blocks * rows, *trailing]
            and shard == [rows, *trailing]
            and inner["chunk_shape"] == [layout.inner_rows, *trailing]
            and codec["name"] == "sharding_indexed"
            and inner["index_location"] == "end"
            and codecs == ["bytes", "crc32c"]
        )
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise damaged(file, "does not describe the array that its split plans")
    return ArrayInfo(path, level, dtype.newbyteorder("<"), trailing)


def _read_column(
    split: Path, path: str, dtype: str, n_samples: int
) -> npt.NDArray[Any]:
    """Whole index array at ``path``, decoded here.

    zarr-python would do it through a thread and an event loop of its own, for a tenfold
    of the time, and would serve a missing chunk as zeros.
    """
    folder = split / path
    chunk_rows = index_chunk(n_samples)
    document = read_json(folder / METADATA)
    expected = {
        "shape": [n_samples],
        "data_type": dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [chunk_rows]},
        },
    }
    if any(document.get(name) != value for name, value in expected.items()):
        raise damaged(folder / METADATA, "does not describe the index of its split")
    parts = [
        _read_chunk(folder / "c" / str(chunk), dtype, chunk_rows)
        for chunk in range(-(-n_samples // chunk_rows))
    ]
    return np.concatenate(parts)[:n_samples]


def _read_chunk(file: Path, dtype: str, rows: int) -> npt.NDArray[Any]:
    raw = without_crc(file.read_bytes()) if file.is_file() else None
    if raw is None:
        raise damaged(file, "is missing or does not match its checksum")
    try:
        if dtype == "string":
            values = VLenUTF8().decode(raw).astype(np.dtypes.StringDType())
        else:
            values = np.frombuffer(raw, np.dtype(dtype).newbyteorder("<"))
    except ValueError:
        values = np.empty(0)
    if len(values) != rows:
        raise damaged(file, f"does not hold {rows} values")
    return values
