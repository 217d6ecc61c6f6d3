"""Reads the rows of one array: out of mapped shards, or out of decoded chunks.

Either way an inner chunk's checksum is compared before the first row of it is returned.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import DamagedStoreError
from pipeline.store.chunks import ChunkCache, Key
from pipeline.store.index import ArrayInfo, SplitIndex
from pipeline.store.layout import IntArray
from pipeline.store.ledger import shard_damage
from pipeline.store.memory_map import advise_will_need
from pipeline.store.messages import name_samples
from pipeline.store.row_slices import RowSlices
from pipeline.store.shard import Bytes, RawLayout, ShardLayout

_UNMAPPED: Bytes = np.empty(0, np.uint8)


class ArrayReader(ABC):
    """One array of a split; gives views of bytes for pieces of its rows."""

    def __init__(self, split: SplitIndex, info: ArrayInfo) -> None:
        self.info = info
        self.layout: ShardLayout = split.layout(info.path)
        self._split = split
        self._row_bytes = info.row_bytes

    @abstractmethod
    def views(self, pieces: RowSlices) -> list[Bytes]:
        """Bytes of every piece, from intact inner chunks.

        Raises
        ------
        DamagedStoreError
            A shard is missing or a chunk of it damaged; names file and samples.
        """

    def empty(self, pieces: RowSlices) -> Bytes:
        """Bytes to copy ``pieces`` into."""
        return np.empty(pieces.total * self._row_bytes, np.uint8)

    def to_rows(self, content: Bytes) -> npt.NDArray[Any]:
        """(rows, *shape) array in which those bytes are the rows."""
        return content.view(self.info.dtype).reshape(-1, *self.info.shape)

    def _lost(self, block: int, what: str) -> DamagedStoreError:
        """Error for a shard of which nothing can be read."""
        positions = self._split.block_positions(block)
        ids = self._split.sample_ids[positions.start : positions.stop]
        names = name_samples([str(name) for name in ids], self._split.name)
        return self._damage(block, f"{what} ({names})")

    def _broken(self, number: int) -> DamagedStoreError:
        """Error for inner chunk ``number``, counted over the whole axis."""
        block, chunk = divmod(number, self.layout.n_chunks)
        first = number * self.layout.inner_rows
        last = first + self.layout.inner_rows
        ids = self._split.find_samples(self.info.level, first, last)
        names = name_samples(ids, self._split.name)
        return self._damage(block, f"has a damaged inner chunk {chunk} ({names})")

    def _damage(self, block: int, what: str) -> DamagedStoreError:
        name = self._split.shard_name(self.info.path, block)
        return shard_damage(self._split.place, name, what, block)


class MappedArray(ArrayReader):
    """Rows where they lie in mapped raw shards."""

    layout: RawLayout

    def __init__(self, split: SplitIndex, info: ArrayInfo) -> None:
        super().__init__(split, info)
        self._stride = self.layout.stride
        self._shards: list[Bytes] = [_UNMAPPED] * split.n_blocks
        self._checked = np.zeros(split.n_blocks * self.layout.n_chunks, np.bool_)
        self._unchecked = len(self._checked)
        self._lock = threading.Lock()

    def views(self, pieces: RowSlices) -> list[Bytes]:
        """Bytes of every piece where they are mapped."""
        if self._unchecked and not self._checked[pieces.number].all():
            self._check(pieces.number)
        shards, row_bytes = self._shards, self._row_bytes
        begin = pieces.chunk * self._stride + pieces.row * row_bytes
        end = begin + pieces.rows * row_bytes
        ranges = zip(pieces.blocks, begin.tolist(), end.tolist(), strict=True)
        return [shards[block][i:j] for block, i, j in ranges]

    def _check(self, chunks: IntArray) -> None:
        with self._lock:
            unchecked = np.unique(chunks[~self._checked[chunks]])
            located = []
            for number in unchecked.tolist():
                block, chunk = divmod(number, self.layout.n_chunks)
                shard = self._shards[block]
                if shard is _UNMAPPED:
                    shard = self._shards[block] = self._map(block)
                begin = chunk * self._stride
                stored = shard[begin : begin + self._stride]
                advise_will_need(stored)
                located.append((number, stored))
            for number, stored in located:
                if self.layout.decode_chunk(stored) is None:
                    raise self._broken(number)
                self._checked[number] = True
                self._unchecked -= 1

    def _map(self, block: int) -> Bytes:
        name = self._split.shard_name(self.info.path, block)
        try:
            shard = self._split.place.map(name)
        except FileNotFoundError:
            raise self._lost(block, "is missing") from None
        assert shard is not None
        fault = self.layout.size_fault(len(shard))
        if fault is not None:
            raise self._lost(block, fault)
        if self.layout.extract_index(shard) is None:
            raise self._lost(block, "has a damaged shard index")
        return shard


class ChunkedArray(ArrayReader):
    """Rows out of decoded inner chunks, for packed shards and for remote ones."""

    def __init__(self, split: SplitIndex, info: ArrayInfo, cache: ChunkCache) -> None:
        super().__init__(split, info)
        self._cache = cache
        self._places: dict[int, IntArray] = {}

    def views(self, pieces: RowSlices) -> list[Bytes]:
        """Bytes of every piece out of decoded chunks."""
        numbers, inverse = np.unique(pieces.number, return_inverse=True)
        owner = self._split.name, self.info.path
        keys = [(*owner, number) for number in numbers.tolist()]
        chunks = self._cache.get(keys, self._load)
        begin = pieces.row * self._row_bytes
        end = begin + pieces.rows * self._row_bytes
        ranges = zip(inverse.tolist(), begin.tolist(), end.tolist(), strict=True)
        return [chunks[chunk][i:j] for chunk, i, j in ranges]

    def _load(self, keys: Sequence[Key]) -> list[Bytes]:
        """Decoded chunks under ascending ``keys``, each shard asked once."""
        numbers = np.array([number for *_, number in keys], np.int64)
        blocks = numbers // self.layout.n_chunks
        loaded: list[Bytes] = []
        for block in np.unique(blocks).tolist():
            mine = numbers[blocks == block]
            loaded += self._load_block(block, mine)
        return loaded

    def _load_block(self, block: int, numbers: IntArray) -> list[Bytes]:
        name = self._split.shard_name(self.info.path, block)
        try:
            places = self._chunk_places(block, name)
            spans = places[numbers % self.layout.n_chunks].tolist()
            stored = self._split.place.ranges(name, spans)
        except FileNotFoundError:
            raise self._lost(block, "is missing") from None
        chunks = []
        for number, content in zip(numbers.tolist(), stored, strict=True):
            rows = self.layout.decode_chunk(content)
            if rows is None:
                raise self._broken(number)
            chunks.append(rows.reshape(-1).view(np.uint8))
        return chunks

    def _chunk_places(self, block: int, name: str) -> IntArray:
        """(n_chunks, 2) begin and end of the inner chunks of ``block``."""
        if isinstance(self.layout, RawLayout):
            return self.layout.places
        if block not in self._places:
            place = self._split.place
            size = place.size(name)
            if size is None:
                raise FileNotFoundError(name)
            fault = self.layout.size_fault(size)
            if fault is not None:
                raise self._lost(block, fault)
            (index,) = place.ranges(name, [(size - self.layout.index_bytes, size)])
            places = self.layout.read_index(index.tobytes(), size)
            if places is None:
                raise self._lost(block, "has a damaged shard index")
            self._places[block] = places
        return self._places[block]


def array_reader(split: SplitIndex, info: ArrayInfo, cache: ChunkCache) -> ArrayReader:
    """The fastest reader that this array allows where it lies."""
    raw = isinstance(split.layout(info.path), RawLayout)
    if raw and split.place.mappable:
        return MappedArray(split, info)
    return ChunkedArray(split, info, cache)
