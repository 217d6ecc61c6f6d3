"""Reads a sealed store: whole samples in any order, straight from mapped shards."""

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import DamagedStoreError, StoreError
from pipeline.fields import Level
from pipeline.store.index import (
    ROOT_KEY,
    SPLITS_KEY,
    ArrayInfo,
    SplitIndex,
    read_root,
    read_split,
)
from pipeline.store.layout import IntArray, inner_rows
from pipeline.store.ledger import check_metadata, is_committed, shard_damage
from pipeline.store.mapping import major_faults, map_file, prefetch
from pipeline.store.shard import Bytes, chunk_is_intact, index_is_intact

__all__ = ["ArrayInfo", "FeatureStore", "SplitReader"]

_UNMAPPED: Bytes = np.empty(0, np.uint8)
# Reads for which read-ahead stays on after pages had to come from disk.
_COLD_READS = 64


class FeatureStore:
    """A store opened for reading; holds no open file and may be used by threads."""

    def __init__(
        self, path: Path, attributes: dict[str, Any], splits: dict[str, "SplitReader"]
    ) -> None:
        self.path = path
        self.attributes = attributes
        self.splits = splits

    @classmethod
    def open(cls, path: Path | str, allow_unsealed: bool = False) -> "FeatureStore":
        """Store at ``path``; an unfinished one only with ``allow_unsealed``.

        Metadata and index of a sealed store are checked against their digests here;
        shards are checked when they are first read.
        """
        path = Path(path)
        root = read_root(path)
        header = root[ROOT_KEY]
        if header["complete"]:
            check_metadata(path)
        splits = {name: read_split(path, name) for name in root[SPLITS_KEY]}
        if not header["complete"] and not allow_unsealed:
            raise StoreError(unsealed_message(path, splits.values()))
        readers = {name: SplitReader(split) for name, split in splits.items()}
        return cls(path, header, readers)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the stored numbers depend on."""
        fingerprint = self.attributes.get("fingerprint")
        if not isinstance(fingerprint, str):
            raise StoreError(
                f"{self.path} was written without a fingerprint; build it again."
            )
        return fingerprint


@dataclass(frozen=True, eq=False)
class _Pieces:
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


class _ArrayReader:
    """Copies pieces of one array out of its mapped shards, each chunk checked once."""

    def __init__(self, split: SplitIndex, path: str) -> None:
        self._split = split
        self._info = split.arrays[path]
        self._layout = split.layout(path)
        self._row_bytes = self._info.row_bytes
        self._stride = self._layout.stride
        self._shards: list[Bytes] = [_UNMAPPED] * split.n_blocks
        self._checked = np.zeros(split.n_blocks * self._layout.n_chunks, np.bool_)
        self._unchecked = len(self._checked)
        self._lock = threading.Lock()

    def views(self, pieces: _Pieces) -> list[Bytes]:
        """Bytes of every piece where they are mapped, from intact inner chunks."""
        if self._unchecked and not self._checked[pieces.number].all():
            self._check(pieces.number)
        shards, row_bytes = self._shards, self._row_bytes
        begin = pieces.chunk * self._stride + pieces.row * row_bytes
        end = begin + pieces.rows * row_bytes
        ranges = zip(pieces.blocks, begin.tolist(), end.tolist(), strict=True)
        return [shards[block][i:j] for block, i, j in ranges]

    def empty(self, pieces: _Pieces) -> Bytes:
        """Bytes to copy ``pieces`` into."""
        return np.empty(pieces.total * self._row_bytes, np.uint8)

    def shaped(self, content: Bytes) -> npt.NDArray[Any]:
        """(rows, *shape) array in which those bytes are the rows."""
        return content.view(self._info.dtype).reshape(-1, *self._info.shape)

    def _check(self, chunks: IntArray) -> None:
        with self._lock:
            unchecked = np.unique(chunks[~self._checked[chunks]])
            located = []
            for number in unchecked.tolist():
                block, chunk = divmod(number, self._layout.n_chunks)
                shard = self._shards[block]
                if shard is _UNMAPPED:
                    shard = self._shards[block] = self._map(block)
                begin = chunk * self._layout.stride
                prefetch(shard[begin : begin + self._layout.stride])
                located.append((number, block, chunk, shard))
            for number, block, chunk, shard in located:
                if not chunk_is_intact(shard, self._layout, chunk):
                    raise self._damage(number, block, chunk)
                self._checked[number] = True
                self._unchecked -= 1

    def _map(self, block: int) -> Bytes:
        file = self._split.shard_file(self._info.path, block)
        try:
            shard = map_file(file)
        except FileNotFoundError:
            raise self._lost(file, "is missing", block) from None
        if len(shard) != self._layout.n_bytes:
            size = f"has {len(shard)} bytes instead of {self._layout.n_bytes}"
            raise self._lost(file, size, block)
        if not index_is_intact(shard, self._layout):
            raise self._lost(file, "has a damaged shard index", block)
        return shard

    def _lost(self, file: Path, what: str, block: int) -> DamagedStoreError:
        positions = self._split.block_positions(block)
        ids = self._split.sample_ids[positions.start : positions.stop]
        names = name_samples([str(name) for name in ids], self._split.name)
        return shard_damage(self._split.store, file, f"{what} ({names})", block)

    def _damage(self, number: int, block: int, chunk: int) -> DamagedStoreError:
        rows = self._layout.inner_rows
        first = number * rows
        ids = self._split.samples_at(self._info.level, first, first + rows)
        names = name_samples(ids, self._split.name)
        file = self._split.shard_file(self._info.path, block)
        what = f"has a damaged inner chunk {chunk} ({names})"
        return shard_damage(self._split.store, file, what, block)


class SplitReader:
    """Samples of one split by storage position, 0 to ``len(self) - 1``."""

    def __init__(self, index: SplitIndex) -> None:
        self._index = index
        self._readers = {path: _ArrayReader(index, path) for path in index.arrays}
        self._by_id: IntArray | None = None
        self._faults = major_faults()
        self._cold_reads = 0

    def __len__(self) -> int:
        return len(self._index.start)

    @property
    def name(self) -> str:
        """Name of the split."""
        return self._index.name

    @property
    def sample_ids(self) -> npt.NDArray[Any]:
        """(n,) ids, of numpy's string dtype."""
        return self._index.sample_ids

    @property
    def n_atoms(self) -> npt.NDArray[np.int32]:
        """(n,) atoms of every sample."""
        return self._index.n_atoms

    @property
    def n_edges(self) -> IntArray:
        """(n,) edges of every sample, in a split that has edge-level arrays."""
        if self._index.edges is None:
            raise StoreError(
                f"Split {self.name!r} of {self._index.store} has no edges; ask for "
                "edge_features in the spec and build the store again."
            )
        return self._index.edges.n_edges

    @property
    def checksums(self) -> npt.NDArray[np.uint64]:
        """(n,) hash of every sample's structure, see ``Structure.checksum``."""
        return self._index.checksums

    @property
    def arrays(self) -> dict[str, ArrayInfo]:
        """Dtype, trailing shape and level of every array by its path."""
        return self._index.arrays

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return self._index.n_blocks

    def block_positions(self, block: int) -> range:
        """Storage positions of the samples of ``block``."""
        return self._index.block_positions(block)

    def position(self, sample_id: str) -> int:
        """Storage position of the sample with this id."""
        ids = self._index.sample_ids
        if self._by_id is None:
            self._by_id = np.argsort(ids, kind="stable")
        # A key of another dtype would make numpy convert all ids.
        key = np.array(sample_id, ids.dtype)
        place = int(np.searchsorted(ids, key, sorter=self._by_id))
        if place < len(ids) and ids[self._by_id[place]] == sample_id:
            return int(self._by_id[place])
        raise StoreError(
            f"Split {self.name!r} of {self._index.store} has no sample {sample_id!r}."
        )

    def read(
        self, positions: npt.ArrayLike, paths: Sequence[str]
    ) -> dict[str, npt.NDArray[Any]]:
        """Rows of the samples at ``positions``, in that order, as fresh arrays.

        Node- and edge-level arrays are concatenated over the samples to (ΣN, *shape)
        and (ΣE, *shape), sample level ones are (len(positions), *shape).
        """
        chosen = self._checked_positions(positions)
        infos = self._index.arrays
        for path in paths:
            if path not in infos:
                raise StoreError(
                    f"Split {self.name!r} of {self._index.store} has no array "
                    f"{path!r}; it has {', '.join(infos)}."
                )
        levels = {infos[path].level for path in paths}
        pieces = {level: self._pieces(level, chosen) for level in levels}
        # All views first, then all copies: copying megabytes empties the processor's
        # caches, after which interpreted code is slow.
        readers = [(self._readers[path], pieces[infos[path].level]) for path in paths]
        views = [reader.views(ranges) for reader, ranges in readers]
        copies = [reader.empty(ranges) for reader, ranges in readers]
        if self._is_cold():
            for view in itertools.chain.from_iterable(views):
                prefetch(view)
        for source, target in zip(views, copies, strict=True):
            if source:
                np.concatenate(source, out=target)
        return {
            path: reader.shaped(copy)
            for path, (reader, _), copy in zip(paths, readers, copies, strict=True)
        }

    def _checked_positions(self, positions: npt.ArrayLike) -> IntArray:
        chosen = np.asarray(positions, np.int64).reshape(-1)
        # Negative numbers are huge when read as unsigned.
        if len(chosen) and chosen.view(np.uint64).max() >= len(self):
            outside = next(p for p in chosen.tolist() if not 0 <= p < len(self))
            raise StoreError(
                f"Position {outside} is outside split {self.name!r}, which has "
                f"{len(self)} samples."
            )
        return chosen

    def _is_cold(self) -> bool:
        """Whether pages lately came from disk, so that asking for them ahead pays."""
        faults = major_faults()
        if faults != self._faults:
            self._faults = faults
            self._cold_reads = _COLD_READS
        elif self._cold_reads:
            self._cold_reads -= 1
        return self._cold_reads > 0

    def _pieces(self, level: Level, positions: IntArray) -> _Pieces:
        index = self._index
        start, rows = index.spans(level, positions)
        if level == "edge":
            # A sample without edges has no row, not even one to check.
            start, rows = start[rows > 0], rows[rows > 0]
        shard_rows = index.rows(level)
        chunk_rows = inner_rows(shard_rows)
        total = int(rows.sum())
        number, row, rows = _cut(*_joined(start, rows), chunk_rows)
        block, chunk = np.divmod(number, shard_rows // chunk_rows)
        return _Pieces(number, block.tolist(), chunk, row, rows, total)


def _joined(start: IntArray, rows: IntArray) -> tuple[IntArray, IntArray]:
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


def name_samples(ids: Sequence[str], split: str) -> str:
    """Few of ``ids`` in words, for an error message."""
    if not ids:
        return f"no sample of split {split!r}"
    shown = ", ".join(repr(name) for name in ids[:5])
    more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
    return f"samples {shown}{more} of split {split!r}"


def unsealed_message(path: Path, splits: Any) -> str:
    """Sentence that names the missing blocks of every split and the way on."""
    missing = []
    for split in splits:
        blocks = [b for b in range(split.n_blocks) if not is_committed(split, b)]
        if blocks:
            missing.append(f"{name_blocks(blocks)} of split {split.name!r}")
    what = "lacks " + " and ".join(missing) if missing else "is complete but not sealed"
    return f"{path} {what}; continue it with `kd-cache build SPEC`."


def name_blocks(blocks: Sequence[int]) -> str:
    """Block numbers in words, at most ten of them."""
    shown = ", ".join(str(block) for block in blocks[:10])
    more = f" and {len(blocks) - 10} more" if len(blocks) > 10 else ""
    return f"block{'s' if len(blocks) > 1 else ''} {shown}{more}"
