"""Full check of a store: every file, every checksum, every invariant of the plan."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.errors import DamagedStoreError
from pipeline.parallel.ordered_map import (
    Count,
    OrderedMap,
    Tally,
    ignore_counts,
    processes,
)
from pipeline.store.backends import StorageBackend, open_backend
from pipeline.store.edges import CELL_OFFSETS, EDGE_INDEX, edge_faults
from pipeline.store.foreign import Alteration
from pipeline.store.index import (
    COMMIT,
    EDGE_IDENTITY,
    ROOT_KEY,
    SPLITS_KEY,
    ArrayInfo,
    SplitIndex,
)
from pipeline.store.layout import (
    EdgeAxis,
    IntArray,
    place_rows,
    place_samples,
    plan_edges,
)
from pipeline.store.ledger import (
    Record,
    find_changed_files,
    read_digests,
    read_record,
    shard_hash,
)
from pipeline.store.messages import name_samples
from pipeline.store.metadata import read_root, read_split
from pipeline.store.shard import Bytes, Rows


@dataclass(frozen=True)
class Problem:
    """Something wrong with a store; ``message`` is a sentence that names the file.

    ``file`` is its name within the store. ``split`` and ``block`` are set where writing
    that block again repairs it, ``cleaned`` where the file is to have that content.
    """

    file: str
    message: str
    split: str | None = None
    block: int | None = None
    cleaned: bytes | None = None

    def __str__(self) -> str:
        return self.message


def verify_store(
    path: Path | str,
    workers: int = 0,
    count: Count = ignore_counts,
) -> list[Problem]:
    """All problems of the store at ``path``; an empty list means it is sound.

    Blocks are checked by so many ``workers``, or by this process; what is found, and
    in which order, is the same. ``count`` is told of the blocks.

    Raises
    ------
    StoreError
        When there is no store at ``path`` or its format is newer than this program's.
    """
    place = open_backend(path)
    try:
        root = read_root(place)
    except DamagedStoreError as error:
        return [Problem("", str(error))]
    problems = list(_metadata_problems(place, root[ROOT_KEY]["complete"]))
    splits = [_open_split(place, name) for name in root[SPLITS_KEY]]
    tally = Tally(count, sum(split.n_blocks for split, _ in splits if split))
    with processes(workers) as run:
        for split, faults in splits:
            problems.extend(faults)
            if split is not None:
                problems.extend(_blocks_problems(split, run, tally))
    return problems


def _problem(
    place: StorageBackend,
    file: str,
    what: str,
    split: str | None = None,
    block: int | None = None,
) -> Problem:
    return Problem(file, f"{place.label(file)} {what}.", split, block)


def _metadata_problems(place: StorageBackend, sealed: bool) -> Iterator[Problem]:
    if not sealed:
        what = "is not sealed; finish it with `kd-cache build SPEC`"
        yield Problem("", f"{place} {what}.")
        return
    try:
        digests = read_digests(place)
    except DamagedStoreError as error:
        yield Problem("", str(error))
        return
    changed = find_changed_files(place, digests, place.fetch(list(digests)))
    for name, altered in changed.items():
        split, _, rest = name.partition("/")
        what = "is not what was sealed"
        if altered is not None:
            yield from _alteration_problems(place, name, altered)
        elif rest.startswith("index/commit/c/"):
            yield _problem(place, name, what, split, int(rest.split("/")[3]))
        else:
            yield _problem(place, name, what)


def _alteration_problems(
    place: StorageBackend, name: str, altered: Alteration
) -> Iterator[Problem]:
    """What has to be removed from a metadata file; attributes of a user may stay."""
    if altered.cleaned is not None:
        what = f"{altered.what}, which `kd-cache verify {place} --repair` removes"
        message = f"{place.label(name)} {what}."
        yield Problem(name, message, cleaned=altered.cleaned)


def _open_split(
    place: StorageBackend, name: str
) -> tuple[SplitIndex | None, list[Problem]]:
    """A split whose blocks can be checked, or what is wrong with it."""
    try:
        split = read_split(place, name)
    except DamagedStoreError as error:
        return None, [Problem(name, str(error))]
    faults = [_problem(place, f"{name}/index", what) for what in _index_faults(split)]
    return None if faults else split, faults


def _blocks_problems(
    split: SplitIndex, run: OrderedMap, tally: Tally
) -> Iterator[Problem]:
    for found in run(partial(_block_problems, split), range(split.n_blocks)):
        tally.add()
        yield from found


def _index_faults(split: SplitIndex) -> list[str]:
    faults = []
    counts = split.n_atoms.astype(np.int64)
    if len(np.unique(split.sample_ids)) < len(counts):
        faults.append("has repeated sample ids")
    if counts.min(initial=1) < 1:
        faults.append("has a sample without atoms")
    bounds = split.block_bounds
    if bounds[0] != 0 or bounds[-1] != len(counts) or np.any(np.diff(bounds) < 1):
        return [*faults, "has samples outside the blocks or empty blocks"]
    start = place_rows(counts, bounds, split.rows_per_block)
    sample_row, sample_rows = place_samples(bounds)
    if not np.array_equal(start, split.start):
        faults.append("has sample starts that do not follow from the atom counts")
    ends = (start + counts - 1) // split.rows_per_block
    if np.any(ends != start // split.rows_per_block):
        faults.append("has a sample that crosses a block")
    if sample_rows != split.samples_per_block or np.any(sample_row != split.sample_row):
        faults.append("has sample rows that do not follow from the blocks")
    if split.edges is not None and not _edges_follow(split.edges, bounds):
        faults.append("has edge starts or rows that do not follow from the edge counts")
    return faults


def _edges_follow(edges: EdgeAxis, bounds: IntArray) -> bool:
    if edges.n_edges.min() < 0:
        return False
    planned = plan_edges(edges.n_edges, bounds)
    return planned.rows_per_block == edges.rows_per_block and np.array_equal(
        planned.start, edges.start
    )


def _block_problems(split: SplitIndex, block: int) -> list[Problem]:
    record = read_record(split, block)
    if record is not None:
        return list(_shard_problems(split, block, record))
    what = f"lacks block {block}"
    return [_problem(split.place, f"{split.name}/{COMMIT}", what, split.name, block)]


def _shard_problems(split: SplitIndex, block: int, record: Record) -> Iterator[Problem]:
    place = split.place
    decoded = {}
    for info, expected in zip(split.arrays.values(), record.tolist(), strict=True):
        file = split.shard_name(info.path, block)
        try:
            shard = np.frombuffer(place.read(file), np.uint8)
        except FileNotFoundError:
            yield _problem(place, file, "is missing", split.name, block)
            continue
        faults, rows = _check_shard(split, block, info, shard, tuple(expected))
        for what in faults:
            yield _problem(place, file, what, split.name, block)
        if info.path in (EDGE_INDEX, CELL_OFFSETS) and rows is not None and not faults:
            decoded[info.path] = rows[: split.valid_rows(info.level, block)]
    if len(decoded) == len(EDGE_IDENTITY):
        edges = decoded[EDGE_INDEX], decoded[CELL_OFFSETS]
        for what, sample in edge_faults(split, block, *edges):
            where = f"{what} ({name_samples([sample], split.name)})"
            file = split.shard_name(EDGE_INDEX, block)
            yield _problem(place, file, where, split.name, block)


def _check_shard(
    split: SplitIndex,
    block: int,
    info: ArrayInfo,
    shard: Bytes,
    expected: tuple[int, ...],
) -> tuple[list[str], Rows | None]:
    """What is wrong with a shard, and its rows where they could be decoded."""
    layout = split.layout(info.path)
    size_fault = layout.size_fault(len(shard))
    if size_fault:
        return [size_fault], None
    faults = []
    if shard_hash(shard, split.hashing) != expected:
        faults.append("does not match its commit record")
    index = layout.extract_index(shard)
    if index is None:
        return [*faults, "has a damaged shard index"], None
    rows, broken = layout.decode(shard, index)
    for chunk in broken:
        first = block * layout.rows + chunk * layout.inner_rows
        ids = split.find_samples(info.level, first, first + layout.inner_rows)
        samples = name_samples(ids, split.name)
        faults.append(f"has a damaged inner chunk {chunk} ({samples})")
    if not broken:
        faults += _value_faults(split, block, info, rows)
    return faults, rows


def _value_faults(
    split: SplitIndex, block: int, info: ArrayInfo, rows: Rows
) -> Iterator[str]:
    valid = split.valid_rows(info.level, block)
    tail = rows[valid:]
    is_fill = np.isnan(tail) if info.dtype.kind == "f" else tail == 0
    if not is_fill.all():
        yield "has values in rows that belong to no sample"
    if info.dtype.kind != "f":
        return
    bad = np.isinf(rows[:valid]) if info.may_be_nan else ~np.isfinite(rows[:valid])
    if bad.any():
        first = int(bad.reshape(valid, -1).any(axis=1).argmax())
        row = block * split.rows(info.level) + first
        ids = split.find_samples(info.level, row, row + 1)
        yield f"has NaN or infinite values ({name_samples(ids, split.name)})"
