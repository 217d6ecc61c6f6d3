from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from pipeline.store.shard import (
    ShardLayout,
    damaged_chunks,
    decode_shard,
    encode_shard,
    index_is_intact,
    with_crc,
    without_crc,
)


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
    shard = encode_shard(values)
    assert shard == file.read_bytes()
    row_bytes = values[0].nbytes
    layout = ShardLayout(rows, row_bytes)
    assert len(shard) == layout.n_bytes
    decoded = decode_shard(np.frombuffer(shard, np.uint8), layout, values.dtype, shape)
    np.testing.assert_array_equal(decoded, values)


def test_big_endian_input_is_stored_little():
    values = np.arange(10, dtype=">f8")
    assert encode_shard(values) == encode_shard(values.astype("<f8"))


def test_every_flipped_byte_is_found_where_it_is():
    layout = ShardLayout(2048, 2)
    intact = np.frombuffer(encode_shard(np.arange(2048, dtype="<u2")), np.uint8)
    assert damaged_chunks(intact, layout) == []
    assert index_is_intact(intact, layout)
    for place in range(0, len(intact), 7):
        shard = intact.copy()
        shard[place] ^= 1 << (place % 8)
        body = layout.n_chunks * layout.stride
        in_index = place >= body
        assert index_is_intact(shard, layout) is not in_index
        expected = [] if in_index else [place // layout.stride]
        assert damaged_chunks(shard, layout) == expected


def test_crc_envelope():
    # Check value of CRC-32C for the digits 1 to 9.
    assert with_crc(b"123456789")[-4:] == 0xE3069283.to_bytes(4, "little")
    assert without_crc(with_crc(b"abc")) == b"abc"
    assert without_crc(b"abc") is None
    assert without_crc(b"") is None
