"""Shards of compressed integers: ``[transpose, bytes, blosc, crc32c]`` inner chunks.

Channels come first inside a chunk and upper bytes behind lower ones. It is compressed
in blocks of a few channels, each with a code of its own: values of one channel are
distributed alike, those of another with another width.
"""

import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numcodecs import blosc

from pipeline.store.layout import IntArray, inner_rows
from pipeline.store.shard import (
    CRC_BYTES,
    INDEX_ENTRY_BYTES,
    Buffer,
    Bytes,
    Rows,
    ShardLayout,
    crc_matches,
    encode_index,
    little_endian,
    with_crc,
    without_crc,
)

CODEC: Literal["zstd"] = "zstd"
SHUFFLE: Literal["shuffle"] = "shuffle"
BLOCK_BYTES = 16384
_HEADER_BYTES = 16


@dataclass(frozen=True)
class CompressedLayout(ShardLayout):
    """Rows compressed by blosc-zstd at level ``clevel``, in chunks of 1024."""

    clevel: int

    @property
    def inner_rows(self) -> int:
        """Rows of one inner chunk."""
        return inner_rows(self.rows)

    @property
    def transposed(self) -> tuple[int, ...]:
        """Order of a chunk's axes when it is compressed: rows last."""
        return (*range(1, len(self.shape) + 1), 0)

    def size_fault(self, n_bytes: int) -> str | None:
        """What is wrong with a shard of ``n_bytes``; None where it may be sound."""
        least = self.index_bytes + self.n_chunks * (_HEADER_BYTES + CRC_BYTES)
        return None if n_bytes >= least else f"has only {n_bytes} bytes"

    def encode(self, rows: Rows, fill: float = 0) -> Buffer:
        """Shard file of ``rows`` (n, *shape), n at most S, and then of ``fill``."""
        rest = np.full((self.rows - len(rows), *self.shape), fill, self.dtype)
        whole = np.concatenate((rows, rest)) if len(rest) else rows
        chunks = whole.reshape(self.n_chunks, -1, *self.shape)
        parts = [self.encode_chunk(chunk) for chunk in chunks]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        begins = np.concatenate(([0], ends[:-1]))
        parts.append(encode_index(np.stack((begins, ends), axis=1)))
        return b"".join(parts)

    def encode_chunk(self, rows: Rows) -> bytes:
        """Stored bytes of one inner chunk."""
        values = little_endian(rows.transpose(self.transposed))
        stored = blosc.compress(
            values.reshape(-1), CODEC.encode(), self.clevel, blosc.SHUFFLE, BLOCK_BYTES
        )
        return with_crc(bytes(stored))

    def read_index(self, index: bytes, n_bytes: int) -> IntArray | None:
        """(n_chunks, 2) begin and end of every inner chunk, without gaps from 0."""
        raw = without_crc(index)
        if raw is None or len(raw) != self.n_chunks * INDEX_ENTRY_BYTES:
            return None
        table = np.frombuffer(raw, "<u8").reshape(-1, 2)
        if table.max() > n_bytes:
            return None
        places = table.astype(np.int64)
        places[:, 1] += places[:, 0]
        dense = np.concatenate(([0], places[:-1, 1]))
        body = n_bytes - self.index_bytes
        sound = np.array_equal(places[:, 0], dense) and places[-1, 1] == body
        return places if sound else None

    def decode_chunk(self, stored: Bytes) -> Rows | None:
        """Rows of a stored inner chunk; None where damaged."""
        if len(stored) < _HEADER_BYTES + CRC_BYTES or not crc_matches(stored):
            return None
        packed = stored[:-CRC_BYTES]
        values = np.empty((*self.shape, self.inner_rows), self.dtype)
        # Sizes of what is inside and of the whole, as blosc's header has them.
        inside, whole = struct.unpack("<4xI4xI", packed[:_HEADER_BYTES].tobytes())
        if inside != values.nbytes or whole != len(packed):
            return None
        try:
            blosc.decompress(packed, values)
        except (RuntimeError, ValueError):
            return None
        return np.ascontiguousarray(np.moveaxis(values, -1, 0))
