"""Creation of a planned store: all metadata and index arrays, no shard yet."""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from filelock import FileLock, Timeout
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, TransposeCodec

from pipeline.errors import SpecError, StoreError
from pipeline.files.atomic import is_free, sync_folder
from pipeline.store.compressed import BLOCK_BYTES, CODEC, SHUFFLE, CompressedLayout
from pipeline.store.edges import EDGE_INDEX
from pipeline.store.index import (
    COMMIT,
    DIGESTS,
    ROOT_KEY,
    SPLIT_KEY,
    SPLITS_KEY,
    XXH3,
    ArrayInfo,
    index_chunk,
    index_columns,
    table_path,
    version_for,
)
from pipeline.store.layout import BlockPlan
from pipeline.store.ledger import digests_size, list_protected_files
from pipeline.store.plan import ArrayPlan, SplitPlan, check_split
from pipeline.store.quantization import ERROR

_AXES = {"node": "atom", "edge": "edge", "sample": "sample"}


def create_store(
    path: Path, splits: Sequence[SplitPlan], attributes: dict[str, Any]
) -> None:
    """Write the whole planned store, unsealed and without blocks, at ``path``.

    A kill leaves ``path`` as it was, absent or an empty folder, or the complete plan.
    ``attributes`` join the root attribute ``kd_cache``, where the reader finds its
    ``fingerprint``.
    """
    for split in splits:
        check_split(split)
    _check_root(splits, attributes)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _creation_lock(path, timeout=-1):
        if not is_free(path):
            raise StoreError(
                f"{path} exists already; continue it with `kd-cache build SPEC` or "
                "choose another path."
            )
        _build_and_rename(path, splits, attributes)


def remove_leftovers(path: Path) -> None:
    """Clear what a killed `create_store` left beside ``path``, if none is at work."""
    if _lock_file(path).exists():
        with suppress(Timeout), _creation_lock(path, timeout=0):
            pass


@contextmanager
def _creation_lock(path: Path, timeout: float) -> Iterator[None]:
    lock_file = _lock_file(path)
    with FileLock(lock_file, timeout=timeout):
        for orphan in path.parent.glob(f".{path.name}.*.partial"):
            if orphan.is_dir():
                shutil.rmtree(orphan)
        try:
            yield
        finally:
            # Removed while held: a waiting process sees that it is gone and retries.
            lock_file.unlink()


def _lock_file(path: Path) -> Path:
    return path.parent / f".{path.name}.lock"


def _build_and_rename(
    path: Path, splits: Sequence[SplitPlan], attributes: dict[str, Any]
) -> None:
    made = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    temporary = Path(made)
    try:
        temporary.chmod(0o755)
        _write_hierarchy(temporary, splits, attributes)
        _sync_tree(temporary)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def _write_hierarchy(
    folder: Path, splits: Sequence[SplitPlan], attributes: dict[str, Any]
) -> None:
    version = version_for(array.path for split in splits for array in split.arrays)
    header = {"format_version": version, "complete": False, **attributes}
    names = [split.name for split in splits]
    root = zarr.create_group(
        folder, zarr_format=3, attributes={ROOT_KEY: header, SPLITS_KEY: names}
    )
    size = digests_size(list_protected_files(split.files for split in splits))
    _create_plain(root, DIGESTS, (size,), (size,), "uint8", ("byte",), {})
    for split in splits:
        _write_split(root, split)


def _write_split(root: zarr.Group, split: SplitPlan) -> None:
    blocks = split.blocks
    group = root.create_group(split.name, attributes={SPLIT_KEY: _split_numbers(split)})
    n_samples = blocks.n_samples
    columns = _index_values(split)
    for path, dtype in index_columns(split.levels.values()).items():
        chunk = (index_chunk(n_samples),)
        axes = ("position",)
        array = _create_plain(group, path, (n_samples,), chunk, dtype, axes, {})
        array[:] = columns[path]
    stored = split.stored
    shape = (blocks.n_blocks, len(stored), 2)
    axes3 = ("block", "array", "word")
    paths = {"arrays": [array.path for array in stored]}
    _create_plain(group, COMMIT, shape, (1, *shape[1:]), "uint64", axes3, paths)
    for array_plan in stored:
        _create_sharded(group, array_plan, blocks)
        _write_tables(group, array_plan.info)


def _write_tables(group: zarr.Group, info: ArrayInfo) -> None:
    """Parameters of the encoding of an array, where it has one."""
    for name, values in ({} if info.encoding is None else info.encoding.params).items():
        axes = ("channel",) if values.ndim == 1 else ("stored_channel", "channel")
        table = _create_plain(
            group,
            table_path(info.path, name),
            values.shape,
            values.shape,
            "float32",
            axes,
            {},
        )
        table[...] = values


def _split_numbers(split: SplitPlan) -> dict[str, Any]:
    """Attribute ``kd_split``: sizes and arrays."""
    blocks = split.blocks
    numbers: dict[str, Any] = {
        "n_samples": blocks.n_samples,
        "n_atoms": int(blocks.n_atoms.sum(dtype=np.int64)),
        "n_blocks": blocks.n_blocks,
        "rows_per_block": blocks.rows_per_block,
        "samples_per_block": blocks.samples_per_block,
    }
    if blocks.edges is not None:
        numbers["n_edges"] = int(blocks.edges.n_edges.sum())
        numbers["edge_rows_per_block"] = blocks.edges.rows_per_block
    return {
        **numbers,
        "hash": XXH3,
        "arrays": [_array_entry(array.info) for array in split.stored],
    }


def _array_entry(info: ArrayInfo) -> dict[str, Any]:
    entry: dict[str, Any] = {"path": info.path, "level": info.level}
    if info.encoding is not None:
        entry["profile"] = info.encoding.profile
        entry["tables"] = list(info.encoding.params)
    return entry


def _index_values(split: SplitPlan) -> dict[str, npt.NDArray[Any]]:
    blocks = split.blocks
    values: dict[str, npt.NDArray[Any]] = {
        "index/sample_id": np.array(split.sample_ids, dtype=np.dtypes.StringDType()),
        "index/start": blocks.start,
        "index/n_atoms": blocks.n_atoms,
        "index/sample_row": blocks.sample_row,
        "index/checksum": split.checksums,
    }
    if blocks.edges is not None:
        values["edges/start"] = blocks.edges.start
        values["edges/n_edges"] = blocks.edges.n_edges
    return values


def _create_sharded(group: zarr.Group, plan: ArrayPlan, blocks: BlockPlan) -> None:
    rows = blocks.rows(plan.level)
    layout = plan.info.layout(rows)
    filters: list[Any] = []
    compressors: list[Any] = [Crc32cCodec()]
    if isinstance(layout, CompressedLayout):
        filters = [TransposeCodec(order=layout.transposed)]
        packing = BloscCodec(
            cname=CODEC,
            clevel=layout.clevel,
            shuffle=SHUFFLE,
            typesize=layout.dtype.itemsize,
            blocksize=BLOCK_BYTES,
        )
        compressors.insert(0, packing)
    group.create_array(
        name=plan.path,
        shape=(blocks.n_blocks * rows, *plan.shape),
        shards=(rows, *plan.shape),
        chunks=(layout.inner_rows, *plan.shape),
        dtype=plan.dtype,
        fill_value=plan.info.fill,
        filters=filters,
        serializer=BytesCodec(endian="little"),
        compressors=compressors,
        attributes=plan.attributes,
        dimension_names=_axis_names(plan),
    )


def _axis_names(plan: ArrayPlan) -> tuple[str | None, ...]:
    known: dict[tuple[int, ...], tuple[str, ...]] = {
        (3, 3): ("vector", "xyz"),
        (3,): ("vector",) if plan.level == "edge" else ("xyz",),
    }
    names: tuple[str | None, ...] = (None,) * len(plan.shape)
    if plan.path == EDGE_INDEX:
        names = ("end",)
    elif plan.path.endswith(ERROR):
        names = ("sum",)
    elif plan.shape in known:
        names = known[plan.shape]
    elif len(plan.shape) == 2:
        names = ("xyz", "channel")
    elif len(plan.shape) == 1:
        names = ("channel",)
    return (_AXES[plan.level], *names)


def _create_plain(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: str,
    axes: tuple[str, ...],
    attributes: dict[str, Any],
) -> zarr.Array:
    return group.create_array(
        name=name,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        fill_value="" if dtype == "string" else 0,
        compressors=Crc32cCodec(),
        attributes=attributes,
        dimension_names=axes,
        config={"write_empty_chunks": True},
    )


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            descriptor = os.open(Path(parent) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(parent))


def _check_root(splits: Sequence[SplitPlan], attributes: dict[str, Any]) -> None:
    if not splits:
        raise SpecError("A store needs at least one split; add one under `splits:`.")
    repeated = [n for n, times in Counter(s.name for s in splits).items() if times > 1]
    if repeated:
        raise SpecError(
            f"Split {repeated[0]!r} is planned twice; rename one of the two."
        )
    clash = sorted({"format_version", "complete"} & attributes.keys())
    if clash:
        raise SpecError(
            f"Attribute {clash[0]!r} is set by the store itself; remove it."
        )
    try:
        json.dumps(attributes, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"The store's attributes are not plain JSON: {error}."
        ) from None
