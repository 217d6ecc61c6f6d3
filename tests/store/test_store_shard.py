from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, TransposeCodec

from pipeline.store.compressed import CompressedLayout
from pipeline.store.shard import RawLayout, ShardLayout, with_crc, without_crc


def as_bytes(shard: bytes) -> np.ndarray:
    return np.frombuffer(shard, np.uint8)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "int8"])
@pytest.mark.parametrize(
    ("rows", "shape"), [(3072, ()), (2048, (5,)), (1024, (3, 4)), (300, (2,)), (1, ())]
)
def test_bytes_equal_those_of_zarr_python(tmp_path: Path, dtype, rows, shape):
    values = np.random.default_rng(0).integers(0, 100, (rows, *shape)).astype(dtype)
    array = zarr.create_array(
        tmp_path / "a",
        shape=values.shape,
        shards=values.shape,
        chunks=(min(rows, 1024), *shape),
        dtype=dtype,
        serializer=BytesCodec(endian="little"),
        compressors=Crc32cCodec(),
        config={"write_empty_chunks": True},
    )
    array[:] = values
    (file,) = [f for f in (tmp_path / "a" / "c").rglob("*") if f.is_file()]
    layout = RawLayout(rows, values.dtype, shape)
    shard = layout.encode(values)
    assert shard == file.read_bytes()
    assert layout.size_fault(len(shard)) is None
    assert "instead of" in layout.size_fault(len(shard) + 1)
    check_decoding(layout, shard, values)


@pytest.mark.parametrize("clevel", [1, 5])
@pytest.mark.parametrize(("rows", "shape"), [(2048, (5,)), (1024, (3, 4)), (300, (7,))])
def test_zarr_python_reads_packed_shards_and_we_read_its(
    tmp_path: Path, clevel, rows, shape
):
    values = np.random.default_rng(1).normal(0, 9, (rows, *shape)).astype(np.int16)
    layout = CompressedLayout(rows, values.dtype, shape, clevel)
    array = zarr.create_array(
        tmp_path / "a",
        shape=values.shape,
        shards=values.shape,
        chunks=(layout.inner_rows, *shape),
        dtype="int16",
        filters=TransposeCodec(order=layout.transposed),
        serializer=BytesCodec(endian="little"),
        compressors=[
            BloscCodec(
                cname="zstd",
                clevel=clevel,
                shuffle="shuffle",
                typesize=2,
                blocksize=16384,
            ),
            Crc32cCodec(),
        ],
    )
    array[:] = values
    (file,) = [f for f in (tmp_path / "a" / "c").rglob("*") if f.is_file()]
    check_decoding(layout, file.read_bytes(), values)
    shard = layout.encode(values)
    check_decoding(layout, shard, values)
    file.write_bytes(shard)
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "a", mode="r")[:], values)


def check_decoding(layout: ShardLayout, shard: bytes, values: np.ndarray) -> None:
    index = layout.extract_index(as_bytes(shard))
    assert index is not None
    decoded, damaged = layout.decode(as_bytes(shard), index)
    assert damaged == []
    assert decoded.dtype == values.dtype
    np.testing.assert_array_equal(decoded, values)


def test_big_endian_input_is_stored_little():
    values = np.arange(10, dtype=">f8")
    layout = RawLayout(10, np.dtype("<f8"), ())
    assert layout.encode(values) == layout.encode(values.astype("<f8"))


LAYOUTS = [
    RawLayout(2048, np.dtype("<u2"), ()),
    CompressedLayout(1024, np.dtype("<i2"), (3,), 2),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_flipped_byte_is_found_where_it_is(layout: ShardLayout):
    rng = np.random.default_rng(2)
    values = rng.integers(0, 90, (layout.rows, *layout.shape)).astype(layout.dtype)
    intact = as_bytes(layout.encode(values))
    index = layout.extract_index(intact)
    assert index is not None
    for place in range(0, len(intact), 7):
        shard = intact.copy()
        shard[place] ^= 1 << (place % 8)
        found = layout.extract_index(shard)
        if place >= index[-1, 1]:
            assert found is None
            continue
        decoded, damaged = layout.decode(shard, found)
        assert damaged == [int(np.searchsorted(index[:, 1], place, side="right"))]
        kept = np.ones(layout.rows, np.bool_)
        first = damaged[0] * layout.inner_rows
        kept[first : first + layout.inner_rows] = False
        np.testing.assert_array_equal(decoded[kept], values[kept])


def test_hostile_packed_chunks_are_damage():
    layout = CompressedLayout(1024, np.dtype("<i2"), (4,), 2)
    other = CompressedLayout(1024, np.dtype("<i2"), (8,), 2)
    values = np.arange(1024 * 8, dtype=np.int16).reshape(1024, 8)
    # Right checksum, but more inside than the array has room for.
    assert layout.decode_chunk(as_bytes(other.encode_chunk(values))) is None
    # Says it is longer than it is: reading on would leave the buffer.
    lying = bytearray(other.encode_chunk(values)[:-4])
    lying[12:16] = (10**6).to_bytes(4, "little")
    assert other.decode_chunk(as_bytes(with_crc(bytes(lying)))) is None
    noise = np.random.default_rng(0).bytes(500)
    assert other.decode_chunk(as_bytes(with_crc(noise))) is None
    assert other.decode_chunk(as_bytes(b"")) is None


def test_packed_index_must_be_dense():
    layout = CompressedLayout(2048, np.dtype("<i2"), (), 2)
    table = np.array([[0, 30], [30, 40]], "<u8")
    size = 70 + layout.index_bytes
    assert layout.read_index(with_crc(table.tobytes()), size).tolist() == [
        [0, 30],
        [30, 70],
    ]
    for wrong in ([[0, 30], [31, 39]], [[0, 30], [30, 41]], [[0, 2**63], [30, 40]]):
        raw = with_crc(np.array(wrong, "<u8").tobytes())
        assert layout.read_index(raw, size) is None
    assert layout.read_index(with_crc(table[:1].tobytes()), size) is None


def test_crc_envelope():
    # Check value of CRC-32C for the digits 1 to 9.
    assert with_crc(b"123456789")[-4:] == 0xE3069283.to_bytes(4, "little")
    assert without_crc(with_crc(b"abc")) == b"abc"
    assert without_crc(b"abc") is None
    assert without_crc(b"") is None
