"""Bytes of one shard: raw little-endian inner chunks with crc32c, index at the end.

This is Zarr's ``sharding_indexed`` with codecs ``[bytes, crc32c]``, always dense, so
that any row lies at an offset known without reading the index.
"""

from dataclasses import dataclass

import google_crc32c
import numpy as np
import numpy.typing as npt

from pipeline.store.layout import inner_rows

CRC_BYTES = 4

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ShardLayout:
    """Sizes of a shard of ``rows`` rows of ``row_bytes`` bytes each."""

    rows: int
    row_bytes: int

    @property
    def inner_rows(self) -> int:
        """Rows of one inner chunk."""
        return inner_rows(self.rows)

    @property
    def n_chunks(self) -> int:
        """Inner chunks of the shard."""
        return self.rows // self.inner_rows

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
        return self.n_chunks * (self.stride + 16) + CRC_BYTES

    def index_bytes(self) -> bytes:
        """Index of the shard: offset and length of every inner chunk, then its crc."""
        index = np.empty((self.n_chunks, 2), "<u8")
        index[:, 0] = np.arange(self.n_chunks, dtype=np.uint64) * np.uint64(self.stride)
        index[:, 1] = self.stride
        raw = index.tobytes()
        return raw + _crc_bytes(google_crc32c.value(raw))


def encode_shard(rows: npt.NDArray[np.generic]) -> bytes:
    """Shard file that holds ``rows`` (S, ...), equal to what zarr-python writes."""
    little = np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))
    row_bytes = little.dtype.itemsize * int(np.prod(little.shape[1:], dtype=np.int64))
    layout = ShardLayout(len(little), row_bytes)
    raw = little.reshape(-1).view(np.uint8).reshape(layout.n_chunks, -1)
    shard = np.empty(layout.n_bytes, np.uint8)
    index = layout.index_bytes()
    body = shard[: -len(index)].reshape(layout.n_chunks, layout.stride)
    body[:, : layout.chunk_bytes] = raw
    for chunk, source in zip(body, raw, strict=True):
        checksum = _crc_bytes(google_crc32c.value(source))
        chunk[layout.chunk_bytes :] = np.frombuffer(checksum, np.uint8)
    shard[-len(index) :] = np.frombuffer(index, np.uint8)
    return shard.tobytes()


def decode_shard(
    shard: Bytes, layout: ShardLayout, dtype: np.dtype, shape: tuple[int, ...]
) -> npt.NDArray[np.generic]:
    """(S, *shape) rows of a shard whose bytes were checked with `damaged_chunks`."""
    body = shard[: layout.n_chunks * layout.stride].reshape(layout.n_chunks, -1)
    raw = np.ascontiguousarray(body[:, : layout.chunk_bytes])
    return raw.reshape(-1).view(dtype).reshape(layout.rows, *shape)


def chunk_is_intact(shard: Bytes, layout: ShardLayout, chunk: int) -> bool:
    """Whether inner chunk number ``chunk`` matches the crc32c stored behind it."""
    begin = chunk * layout.stride
    end = begin + layout.chunk_bytes
    stored = shard[end : end + CRC_BYTES].tobytes()
    return _crc_bytes(google_crc32c.value(shard[begin:end])) == stored


def damaged_chunks(shard: Bytes, layout: ShardLayout) -> list[int]:
    """Numbers of the inner chunks that do not match their crc32c."""
    chunks = range(layout.n_chunks)
    return [chunk for chunk in chunks if not chunk_is_intact(shard, layout, chunk)]


def index_is_intact(shard: Bytes, layout: ShardLayout) -> bool:
    """Whether the index at the end of the shard is the one a dense shard must have."""
    index = layout.index_bytes()
    return shard[-len(index) :].tobytes() == index


def with_crc(raw: bytes) -> bytes:
    """``raw`` followed by its crc32c, as Zarr's ``crc32c`` codec stores a chunk."""
    return raw + _crc_bytes(google_crc32c.value(raw))


def without_crc(stored: bytes) -> bytes | None:
    """Bytes in front of a matching crc32c; None where it does not match."""
    raw, checksum = stored[:-CRC_BYTES], stored[-CRC_BYTES:]
    return raw if _crc_bytes(google_crc32c.value(raw)) == checksum else None


def _crc_bytes(value: int) -> bytes:
    return value.to_bytes(CRC_BYTES, "little")
