"""Bytes of one shard: inner chunks, each with its crc32c, and an index at the end.

This is Zarr's ``sharding_indexed``, always dense and in order. Raw shards have codecs
``[bytes, crc32c]``, so that any row lies at an offset known without reading the index;
packed ones are in ``pipeline.store.compressed``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from pipeline.store.layout import IntArray, inner_rows

CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16

Bytes = npt.NDArray[np.uint8]
Rows = npt.NDArray[Any]
Buffer = bytes | memoryview


@dataclass(frozen=True)
class ShardLayout(ABC):
    """How ``rows`` rows of ``shape`` and ``dtype`` become the bytes of a shard."""

    rows: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one decoded row."""
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))

    @property
    @abstractmethod
    def inner_rows(self) -> int:
        """Rows of one inner chunk."""

    @property
    def n_chunks(self) -> int:
        """Inner chunks of the shard."""
        return self.rows // self.inner_rows

    @property
    def index_bytes(self) -> int:
        """Size of the index at the end of the shard, with its crc."""
        return self.n_chunks * INDEX_ENTRY_BYTES + CRC_BYTES

    @abstractmethod
    def size_fault(self, n_bytes: int) -> str | None:
        """What is wrong with a shard of ``n_bytes``; None where it may be sound."""

    @abstractmethod
    def encode(self, rows: Rows, fill: float = 0) -> Buffer:
        """Shard file of ``rows`` (n, *shape), n at most S, and then of ``fill``."""

    @abstractmethod
    def read_index(self, index: bytes, n_bytes: int) -> IntArray | None:
        """(n_chunks, 2) begin and end of every inner chunk, its crc included.

        ``index`` are the last ``index_bytes`` of a shard of ``n_bytes``; None where
        they are not what they must be.
        """

    @abstractmethod
    def decode_chunk(self, stored: Bytes) -> Rows | None:
        """(inner_rows, *shape) rows of a stored inner chunk; None where damaged."""

    def extract_index(self, shard: Bytes) -> IntArray | None:
        """`read_index` of a whole shard."""
        return self.read_index(shard[-self.index_bytes :].tobytes(), len(shard))

    def decode(self, shard: Bytes, index: IntArray) -> tuple[Rows, list[int]]:
        """(S, *shape) rows of a shard and the numbers of its damaged inner chunks.

        Rows of damaged chunks are 0.
        """
        rows = np.zeros((self.n_chunks, self.inner_rows, *self.shape), self.dtype)
        damaged = []
        for chunk, (begin, end) in enumerate(index.tolist()):
            decoded = self.decode_chunk(shard[begin:end])
            if decoded is None:
                damaged.append(chunk)
            else:
                rows[chunk] = decoded
        return rows.reshape(self.rows, *self.shape), damaged


class RawLayout(ShardLayout):
    """Uncompressed little-endian rows in chunks of 1024."""

    @property
    def inner_rows(self) -> int:
        """Rows of one inner chunk."""
        return inner_rows(self.rows)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one inner chunk without its checksum."""
        return self.inner_rows * self.row_bytes

    @property
    def stride(self) -> int:
        """Bytes from one inner chunk to the next."""
        return self.chunk_bytes + CRC_BYTES

    @property
    def n_bytes(self) -> int:
        """Size of the whole shard file."""
        return self.n_chunks * self.stride + self.index_bytes

    @property
    def places(self) -> IntArray:
        """(n_chunks, 2) begin and end of every inner chunk, its crc included."""
        begin = np.arange(self.n_chunks, dtype=np.int64) * self.stride
        return np.stack((begin, begin + self.stride), axis=1)

    def size_fault(self, n_bytes: int) -> str | None:
        """What is wrong with a shard of ``n_bytes``; None where it may be sound."""
        if n_bytes == self.n_bytes:
            return None
        return f"has {n_bytes} bytes instead of {self.n_bytes}"

    def encode(self, rows: Rows, fill: float = 0) -> Buffer:
        """Shard file of ``rows`` and ``fill``, as zarr-python writes it."""
        shard = np.empty(self.n_bytes, np.uint8)
        body = shard[: -self.index_bytes].reshape(self.n_chunks, self.stride)
        for number, stored in enumerate(body):
            # Each chunk is copied and summed up while it is in the processor's cache.
            first = number * self.inner_rows
            content = stored[: self.chunk_bytes]
            part = _as_bytes(rows[first : first + self.inner_rows])
            content[: len(part)] = part
            if len(part) < self.chunk_bytes:
                missing = self.inner_rows - len(part) // self.row_bytes
                rest = np.full((missing, *self.shape), fill, self.dtype)
                content[len(part) :] = _as_bytes(rest)
            checksum = crc_bytes(google_crc32c.value(content))
            stored[self.chunk_bytes :] = np.frombuffer(checksum, np.uint8)
        index = encode_index(self.places)
        shard[-self.index_bytes :] = np.frombuffer(index, np.uint8)
        return shard.data

    def read_index(self, index: bytes, n_bytes: int) -> IntArray | None:
        """(n_chunks, 2) begin and end of every inner chunk, as they must be."""
        places = self.places
        return places if encode_index(places) == index else None

    def decode_chunk(self, stored: Bytes) -> Rows | None:
        """Rows of a stored inner chunk, a view of its bytes; None where damaged."""
        if len(stored) != self.stride or not crc_matches(stored):
            return None
        rows = stored[: self.chunk_bytes].view(self.dtype)
        return rows.reshape(self.inner_rows, *self.shape)


def little_endian(rows: Rows) -> Rows:
    """``rows`` contiguous and in little-endian order."""
    return np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))


def _as_bytes(rows: Rows) -> Bytes:
    return little_endian(rows).reshape(-1).view(np.uint8)


def encode_index(places: IntArray) -> bytes:
    """Index for chunks from begin to end (n, 2): offset and size of each, then crc."""
    index = places.astype("<u8")
    index[:, 1] -= index[:, 0]
    return with_crc(index.tobytes())


def crc_matches(stored: Bytes) -> bool:
    """Whether bytes end with the crc32c of those before."""
    checksum = crc_bytes(google_crc32c.value(stored[:-CRC_BYTES]))
    return checksum == stored[-CRC_BYTES:].tobytes()


def with_crc(raw: bytes) -> bytes:
    """``raw`` followed by its crc32c, as Zarr's ``crc32c`` codec stores a chunk."""
    return raw + crc_bytes(google_crc32c.value(raw))


def without_crc(stored: bytes) -> bytes | None:
    """Bytes in front of a matching crc32c; None where it does not match."""
    raw, checksum = stored[:-CRC_BYTES], stored[-CRC_BYTES:]
    return raw if crc_bytes(google_crc32c.value(raw)) == checksum else None


def crc_bytes(value: int) -> bytes:
    """A crc32c as it is stored."""
    return value.to_bytes(CRC_BYTES, "little")
