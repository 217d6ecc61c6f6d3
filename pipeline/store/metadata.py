"""Reads and checks the metadata and index arrays of a store.

Decoded here: zarr-python would do it through a thread and an event loop of its own, for
a tenfold of the time, and would serve a missing chunk as zeros.
"""

import json
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from numcodecs.vlen import VLenUTF8

from pipeline.errors import DamagedStoreError, StoreError
from pipeline.fields import Level
from pipeline.store.backends import StorageBackend
from pipeline.store.compressed import CODEC, SHUFFLE, CompressedLayout
from pipeline.store.index import (
    BLAKE2B,
    EDGE_IDENTITY,
    FORMAT_VERSION,
    LEVELS,
    METADATA,
    ROOT_KEY,
    SPLIT_KEY,
    SPLITS_KEY,
    XXH3,
    ArrayInfo,
    SplitIndex,
    index_chunk,
    index_columns,
    shard_key,
    table_path,
)
from pipeline.store.layout import EdgeAxis, block_rows
from pipeline.store.quantization import DTYPES, TABLES, Profile, Quantization
from pipeline.store.shard import without_crc


@dataclass(frozen=True)
class _ArrayEntry:
    """What the attributes of a split say of an array."""

    path: str
    level: Level
    profile: Profile | None
    tables: tuple[str, ...]


def read_root(place: StorageBackend) -> dict[str, Any]:
    """Attributes of the root group, checked to be those of a readable feature store."""
    if place.size(METADATA) is None:
        raise StoreError(
            f"{place} is not a feature store, it has no {METADATA}; make one with "
            "`kd-cache build SPEC`."
        )
    attributes = read_attributes(place, METADATA)
    header = attributes.get(ROOT_KEY)
    if not isinstance(header, dict):
        raise StoreError(
            f"{place} is a Zarr group but not a feature store: its attributes lack "
            f"{ROOT_KEY!r}; give the path that `kd-cache build` wrote."
        )
    version = header.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise StoreError(
            f"{place} has format version {version} and this program reads up to "
            f"{FORMAT_VERSION}; update kd-train or build the store again."
        )
    names = attributes.get(SPLITS_KEY)
    known = isinstance(version, int) and version >= 1
    sound = known and isinstance(header.get("complete"), bool)
    if not sound or not isinstance(names, list):
        raise damaged_file_error(place, METADATA, "lacks its version, state or splits")
    return attributes


def read_attributes(place: StorageBackend, name: str) -> dict[str, Any]:
    """Attributes in a ``zarr.json``."""
    attributes = read_json(place, name).get("attributes")
    if not isinstance(attributes, dict):
        raise damaged_file_error(place, name, "has no attributes")
    return attributes


def read_json(place: StorageBackend, name: str) -> dict[str, Any]:
    """JSON object in a file; a missing or unreadable one is a damaged store."""
    try:
        content = json.loads(place.read(name))
    except FileNotFoundError:
        raise damaged_file_error(place, name, "is missing") from None
    except (ValueError, RecursionError):
        raise damaged_file_error(place, name, "is not readable as JSON") from None
    if not isinstance(content, dict):
        raise damaged_file_error(place, name, "is not a JSON object")
    return content


def damaged_file_error(
    place: StorageBackend, name: str, what: str
) -> DamagedStoreError:
    """Error for a file that cannot be rebuilt from the teacher alone."""
    return DamagedStoreError(
        f"{place.label(name)} {what}; restore it from a copy or build the store again."
    )


def read_split(place: StorageBackend, name: str) -> SplitIndex:
    """Plan of split ``name``, whose parts are checked to fit together."""
    file = f"{name}/{METADATA}"
    plan: Any = read_attributes(place, file).get(SPLIT_KEY)
    try:
        numbers = {
            key: int(plan[key])
            for key in ("n_blocks", "rows_per_block", "samples_per_block")
        }
        n_samples = int(plan["n_samples"])
        entries = [_array_entry(item) for item in plan["arrays"]]
        totals = {"index/n_atoms": int(plan["n_atoms"])}
        levels = [entry.level for entry in entries]
        hashing = plan.get("hash", BLAKE2B)
        if hashing not in (BLAKE2B, XXH3):
            raise ValueError
        if "edge" in levels:
            totals["edges/n_edges"] = int(plan["n_edges"])
            numbers["edge_rows_per_block"] = int(plan["edge_rows_per_block"])
    except (TypeError, KeyError, ValueError):
        raise damaged_file_error(place, file, f"lacks a usable {SPLIT_KEY!r}") from None
    columns = {
        path: _read_column(place, f"{name}/{path}", dtype, n_samples)
        for path, dtype in index_columns(levels).items()
    }
    for path, total in totals.items():
        if int(columns[path].sum(dtype=np.int64)) != total:
            what = path.partition("/n_")[2]
            raise damaged_file_error(
                place, file, f"says {total} {what}, which is not the sum of its counts"
            )
    index = _split_index(place, name, numbers, entries, columns)
    return replace(index, hashing=hashing)


def _array_entry(item: dict[str, Any]) -> _ArrayEntry:
    profile = item.get("profile")
    tables = tuple(item.get("tables", ()))
    if profile is not None and (profile not in DTYPES or not set(tables) <= {*TABLES}):
        raise ValueError
    return _ArrayEntry(str(item["path"]), LEVELS[item["level"]], profile, tables)


def _split_index(
    place: StorageBackend,
    name: str,
    numbers: dict[str, int],
    entries: list[_ArrayEntry],
    columns: dict[str, npt.NDArray[Any]],
) -> SplitIndex:
    edge_rows = numbers.pop("edge_rows_per_block", None)
    edges = None
    if edge_rows is not None:
        edges = EdgeAxis(columns["edges/start"], columns["edges/n_edges"], edge_rows)
    n_blocks = numbers["n_blocks"]
    sizes = numbers["rows_per_block"], numbers["samples_per_block"], edges
    arrays = {
        entry.path: _read_array_info(
            place, name, entry, block_rows(entry.level, *sizes), n_blocks
        )
        for entry in entries
    }
    _check_related(place, name, arrays, edges is not None)
    return SplitIndex(
        place=place,
        name=name,
        n_blocks=n_blocks,
        rows_per_block=numbers["rows_per_block"],
        samples_per_block=numbers["samples_per_block"],
        arrays=arrays,
        sample_ids=columns["index/sample_id"],
        start=columns["index/start"],
        n_atoms=columns["index/n_atoms"],
        sample_row=columns["index/sample_row"],
        checksums=columns["index/checksum"],
        edges=edges,
    )


def _check_related(
    place: StorageBackend, split: str, arrays: dict[str, ArrayInfo], has_edges: bool
) -> None:
    """Raise where arrays that need each other are not all there."""
    file = f"{split}/{METADATA}"
    for field in EDGE_IDENTITY if has_edges else ():
        info = arrays.get(field.path)
        if info is None or (info.shape, info.dtype) != (field.shape, field.dtype):
            what = f"plans edge arrays without a usable {field.path!r}"
            raise damaged_file_error(place, file, what)
    for info in arrays.values():
        missing = [c for c in info.scale_arrays if c not in arrays]
        if missing:
            raise damaged_file_error(
                place, file, f"plans {info.path!r} without {missing[0]!r}"
            )


def _read_array_info(
    place: StorageBackend, split: str, entry: _ArrayEntry, rows: int, n_blocks: int
) -> ArrayInfo:
    name = f"{split}/{entry.path}/{METADATA}"
    document = read_json(place, name)
    try:
        shape = [int(size) for size in document["shape"]]
        grid = document["chunk_grid"]["configuration"]["chunk_shape"]
        (codec,) = document["codecs"]
        inner = codec["configuration"]
        dtype = np.dtype(document["data_type"]).newbyteorder("<")
        trailing = tuple(shape[1:])
        info = ArrayInfo(
            entry.path,
            entry.level,
            dtype,
            trailing,
            clevel=_read_clevel(inner["codecs"]),
        )
        layout = info.layout(rows)
        sound = (
            shape == [n_blocks * rows, *trailing]
            and grid == [rows, *trailing]
            and inner["chunk_shape"] == [layout.inner_rows, *trailing]
            and codec["name"] == "sharding_indexed"
            and inner["index_location"] == "end"
            and (entry.profile is None or dtype == DTYPES[entry.profile])
            and (
                not isinstance(layout, CompressedLayout)
                or _is_compressed(inner, layout)
            )
        )
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise damaged_file_error(
            place, name, "does not describe the array that its split plans"
        )
    if entry.profile is None:
        return info
    encoding = _read_quantization(place, split, entry, trailing)
    return ArrayInfo(
        entry.path, entry.level, dtype, trailing, encoding, clevel=info.clevel
    )


def _read_clevel(codecs: list[dict[str, Any]]) -> int | None:
    """Level of compression that inner codecs have; None for raw ones."""
    names = [codec["name"] for codec in codecs]
    if names == ["bytes", "crc32c"]:
        return None
    if names != ["transpose", "bytes", "blosc", "crc32c"]:
        raise ValueError
    return int(codecs[2]["configuration"]["clevel"])


def _is_compressed(inner: dict[str, Any], layout: CompressedLayout) -> bool:
    transpose, _, compressor, _ = (codec["configuration"] for codec in _full(inner))
    return (
        transpose["order"] == list(layout.transposed)
        and compressor["cname"] == CODEC
        and compressor["shuffle"] == SHUFFLE
        and compressor["typesize"] == layout.dtype.itemsize
    )


def _full(inner: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"configuration": {}, **codec} for codec in inner["codecs"]]


def _read_quantization(
    place: StorageBackend, split: str, entry: _ArrayEntry, trailing: tuple[int, ...]
) -> Quantization:
    channels = trailing[-1]
    shapes = {name: (channels,) for name in TABLES} | {"rotation": (channels, channels)}
    tables = {
        name: _read_table(
            place, f"{split}/{table_path(entry.path, name)}", shapes[name]
        )
        for name in entry.tables
    }
    try:
        return Quantization.from_params(cast(Profile, entry.profile), tables)
    except TypeError:
        what = f"lacks parameters of {entry.path!r}"
        raise damaged_file_error(place, f"{split}/{METADATA}", what) from None


def _read_table(
    place: StorageBackend, path: str, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    document = read_json(place, f"{path}/{METADATA}")
    if (document.get("shape"), document.get("data_type")) != (list(shape), "float32"):
        raise damaged_file_error(place, f"{path}/{METADATA}", "does not fit its array")
    name = f"{path}/{shard_key(len(shape) - 1, 0)}"
    raw = read_checked(place, name)
    if len(raw) != 4 * int(np.prod(shape)):
        raise damaged_file_error(place, name, f"does not hold {shape} values")
    values = np.frombuffer(raw, "<f4").reshape(shape)
    if not np.isfinite(values).all():
        raise damaged_file_error(place, name, "holds values that are no numbers")
    return values


def _read_column(
    place: StorageBackend, path: str, dtype: str, n_samples: int
) -> npt.NDArray[Any]:
    """Whole index array at ``path``."""
    chunk_rows = index_chunk(n_samples)
    document = read_json(place, f"{path}/{METADATA}")
    expected = {
        "shape": [n_samples],
        "data_type": dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [chunk_rows]},
        },
    }
    if any(document.get(name) != value for name, value in expected.items()):
        what = "does not describe the index of its split"
        raise damaged_file_error(place, f"{path}/{METADATA}", what)
    parts = [
        _read_chunk(place, f"{path}/c/{chunk}", dtype, chunk_rows)
        for chunk in range(-(-n_samples // chunk_rows))
    ]
    return np.concatenate(parts)[:n_samples]


def _read_chunk(
    place: StorageBackend, name: str, dtype: str, rows: int
) -> npt.NDArray[Any]:
    raw = read_checked(place, name)
    try:
        if dtype == "string":
            values = VLenUTF8().decode(raw).astype(np.dtypes.StringDType())
        else:
            values = np.frombuffer(raw, np.dtype(dtype).newbyteorder("<"))
    except ValueError:
        values = np.empty(0)
    if len(values) != rows:
        raise damaged_file_error(place, name, f"does not hold {rows} values")
    return values


def read_checked(place: StorageBackend, name: str) -> bytes:
    """Content of a chunk in front of its crc32c."""
    try:
        raw = without_crc(place.read(name))
    except FileNotFoundError:
        raw = None
    if raw is None:
        raise damaged_file_error(
            place, name, "is missing or does not match its checksum"
        )
    return raw
