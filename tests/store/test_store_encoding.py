"""Profiles q8 and compact: what is stored, what is read, and how far it is off."""

import json
import shutil
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_store
import zarr

from pipeline.errors import DamagedStoreError, DataError
from pipeline.store.calibration import calibrate
from pipeline.store.compressed import CompressedLayout
from pipeline.store.quantization import DTYPES, Quantization, relative_error
from pipeline.store.reader import FeatureStore, SplitReader
from pipeline.store.verify import verify_store
from pipeline.store.writer import StoreWriter, create_store

PLAN = toy_store.plan("coded")
FEATURES = [a for a in PLAN.arrays if a.path.startswith("features/")]
# Of q8 there is no choice; it is stated as measured on real features.
STATED = {"q8": 2e-4, "compact": toy_store.STATED_ERROR}


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("coded") / "toy.zarr"
    toy_store.build(path, ("coded",))
    return path


@pytest.fixture(scope="module")
def reader(coded: Path) -> SplitReader:
    return FeatureStore.open(coded).splits["coded"]


def exact(array, positions) -> np.ndarray:
    samples = [int(PLAN.blocks.order[p]) for p in positions]
    return np.concatenate([toy_store.value_of("coded", s, array) for s in samples])


def decoded_in_plain_python(rows, scales, tables) -> np.ndarray:
    """The documented formula, one row at a time, in double precision."""
    found = []
    for number, row in enumerate(rows):
        values = row.astype(np.float64) - tables.get("zero", 0.0)
        values = values * tables["channel_scale"].astype(np.float64)
        if scales is not None:
            values = values * float(scales[number])
        if "rotation" in tables:
            values = values @ tables["rotation"].astype(np.float64)
        found.append(values + tables["mean"])
    return np.array(found)


@pytest.mark.parametrize("library", ["zarr-python", "tensorstore"])
@pytest.mark.parametrize("array", FEATURES, ids=lambda a: a.path)
def test_other_libraries_read_what_we_decode(coded, reader, array, library):
    def read(path: str) -> np.ndarray:
        if library == "zarr-python":
            return zarr.open_array(coded / "coded" / path, mode="r")[...]
        tensorstore = pytest.importorskip("tensorstore")
        place = {"driver": "file", "path": str(coded / "coded" / path)}
        spec = {"driver": "zarr3", "kvstore": place}
        return tensorstore.open(spec, read=True).result().read().result()

    entries = zarr.open_group(coded, mode="r")["coded"].attrs["kd_split"]["arrays"]
    (entry,) = (e for e in entries if e["path"] == array.path)
    tables = {n: read(f"encodings/{array.path}/{n}") for n in entry["tables"]}
    integers = read(array.path)
    assert integers.dtype == array.dtype
    scales = read(array.path + "_scale") if entry["profile"] == "q8" else None
    expected = decoded_in_plain_python(integers, scales, tables)
    rng = np.random.default_rng(6)
    for positions in (rng.permutation(len(reader)), rng.integers(0, len(reader), 5)):
        rows = np.concatenate(
            [
                np.arange(a, a + n)
                for a, n in zip(
                    PLAN.blocks.start[positions],
                    PLAN.blocks.n_atoms[positions],
                    strict=True,
                )
            ]
        )
        got = reader.read(positions, [array.path])[array.path]
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("array", FEATURES, ids=lambda a: a.path)
def test_the_stated_error_is_kept_and_the_stored_one_is_true(reader, array):
    everyone = np.arange(len(reader))
    wanted = exact(array, everyone).astype(np.float64)
    got = reader.read(everyone, [array.path])[array.path]
    center = wanted.mean(axis=0) if array.shape == (12,) else 0.0
    error = np.square(got - wanted).sum() / np.square(wanted - center).sum()
    assert error <= 1.1 * STATED[reader.encoding(array.path).profile]
    # The mean of the sample it was calibrated on is not quite that of all.
    assert reader.error(array.path) == pytest.approx(error, rel=0.02)
    if array.dtype == "int16":
        assert error > 0.5 * toy_store.STATED_ERROR
    sums = reader.read_stored([7], [array.path + "_error"])[array.path + "_error"]
    mine = exact(array, [7]).astype(np.float64)
    mine_read = reader.read([7], [array.path])[array.path]
    assert sums[0, 0] == pytest.approx(np.square(mine_read - mine).sum(), rel=1e-6)


def test_companions_are_no_fields_of_their_own(reader):
    assert list(reader.arrays) == [array.path for array in PLAN.arrays]
    assert reader.error("labels/energy") is None
    stored = reader.read_stored([3], ["features/node_features"])
    assert stored["features/node_features"].dtype == np.int8


def test_compact_is_small_and_rotates_where_that_helps(reader):
    atoms = int(reader.n_atoms.sum())
    path = "features/turned_features"
    assert reader.encoding(path).rotation is not None
    assert reader.bytes_stored("features/node_features") > atoms * 12
    assert reader.bytes_stored(path) < 0.6 * atoms * 24 * 2


def test_integers_pack_nearly_to_their_entropy():
    """Channels of different widths, each coded nearly as well as by its own code."""
    rng = np.random.default_rng(9)
    values = rng.standard_normal((4096, 64)) * np.geomspace(0.5, 2, 64)
    found = calibrate(values[:2048].astype(np.float32), "compact", 1e-3)
    integers, _ = found.encoding.encode(values[2048:])
    bits = 0.0
    for channel in integers.T:
        _, counts = np.unique(channel, return_counts=True)
        bits -= (counts * np.log2(counts / len(channel))).sum()
    assert found.clevel is not None
    layout = CompressedLayout(2048, integers.dtype, (64,), found.clevel)
    assert bits / 8 < len(layout.encode(integers)) < 1.1 * bits / 8


@pytest.mark.parametrize("profile", ["q8", "compact"])
def test_vectors_stay_equivariant(profile):
    """A rotated structure decodes to rotated vectors, up to the stated error."""
    rng = np.random.default_rng(3)
    vectors = toy_store._correlated(rng, (900, 3, 8))
    encoding = calibrate(vectors, profile, 1e-3).encoding
    assert not encoding.mean.any()
    turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    turned = np.einsum("xy,nyc->nxc", turn, vectors).astype(np.float32)
    first = encoding.decode(*encoding.encode(vectors))
    second = encoding.decode(*encoding.encode(turned))
    difference = second - np.einsum("xy,nyc->nxc", turn, first)
    assert np.square(difference).sum() < 4 * 1e-3 * np.square(vectors).sum()
    # What decoding does with integers commutes with rotations exactly.
    if encoding.rotation is not None:
        identity = encoding.rotation @ encoding.rotation.T
        np.testing.assert_allclose(identity, np.eye(8), atol=1e-5)


@pytest.mark.parametrize("error", [1e-4, 1e-3, 1e-2])
def test_a_larger_error_takes_fewer_bytes(error):
    rng = np.random.default_rng(5)
    values = toy_store._correlated(rng, (2048, 12))
    found = calibrate(values, "compact", error)
    fresh = toy_store._correlated(rng, (2048, 12))
    decoded = found.encoding.decode(*found.encoding.encode(fresh))
    assert relative_error(found.encoding.error(fresh, decoded)) == pytest.approx(
        error, rel=0.12
    )
    finer = calibrate(values, "compact", error / 10)
    assert finer.encoding.channel_scale[0] < found.encoding.channel_scale[0] / 2


@pytest.mark.parametrize("profile", ["q8", "compact"])
@pytest.mark.parametrize("shape", [(1, 4), (40, 4), (40, 3, 4)])
def test_features_without_variance_survive(profile, shape):
    values = np.zeros(shape, np.float32)
    values[..., 1] = 2.5 if len(shape) == 2 else 0
    encoding = calibrate(values, profile, 1e-3).encoding
    decoded = encoding.decode(*encoding.encode(values))
    np.testing.assert_allclose(decoded, values, atol=1e-6)


def test_row_scales_never_round_below_their_row():
    rng = np.random.default_rng(7)
    values = (
        rng.standard_normal((5000, 6)) * 10 ** rng.uniform(-6, 4, (5000, 1))
    ).astype(np.float32)
    ones, none = np.ones(6, np.float32), np.zeros(6, np.float32)
    encoding = Quantization("q8", ones, none)
    integers, scale = encoding.encode(values)
    assert np.abs(integers.astype(int)).max() == 127
    off = np.abs(encoding.decode(integers, scale) - values)
    assert (off <= 0.5001 * scale.astype(np.float32)[:, None]).all()


def made_encoding(profile: str, rotated: bool) -> tuple[Quantization, np.ndarray, Any]:
    """An encoding of 24 channels, integers and scales, equal on every machine."""
    rng = np.random.default_rng(11)

    def floats(*shape: int) -> np.ndarray:
        return (rng.integers(-(2**23), 2**23, shape) / 2**24).astype(np.float32)

    scale, mean = np.abs(floats(24)) + np.float32(0.01), floats(24)
    rotation = floats(24, 24) if rotated else None
    zero = np.full(24, 128, np.float32) if profile == "compact" else None
    encoding = Quantization(profile, scale, mean, rotation, zero)
    limit = 2**15 - 1 if profile == "compact" else 127
    integers = rng.integers(-limit, limit, (700, 3, 24)).astype(DTYPES[profile])
    scales = np.abs(floats(700)).astype(np.float16) if profile == "q8" else None
    return encoding, integers, scales


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("profile", ["q8", "compact"])
def test_bits_of_a_row_do_not_depend_on_other_rows(profile, rotated):
    encoding, integers, scales = made_encoding(profile, rotated)
    whole = encoding.decode(integers, scales)
    assert whole.dtype == np.float32
    rng = np.random.default_rng(1)
    batches = [rng.integers(0, 700, size) for size in (*range(1, 30), 100, 513, 699)]
    for rows in batches:
        some = None if scales is None else scales[rows]
        np.testing.assert_array_equal(
            encoding.decode(integers[rows], some), whole[rows]
        )
    tables = {name: table.astype(np.float64) for name, table in encoding.params.items()}
    expected = decoded_in_plain_python(integers, scales, tables)
    np.testing.assert_allclose(whole, expected, rtol=1e-6, atol=1e-6 * expected.std())


@pytest.mark.parametrize(
    ("profile", "rotated", "digest"),
    [
        ("q8", False, 0x530FAE7E),
        ("compact", False, 0xF84F43C3),
        ("q8", True, 0x76DE6E5F),
        ("compact", True, 0xD72F33AF),
    ],
)
def test_bits_are_the_same_on_every_processor(profile, rotated, digest):
    """The sums are exact, so that no library or processor can round otherwise."""
    encoding, integers, scales = made_encoding(profile, rotated)
    decoded = encoding.decode(integers, scales).astype("<f4")
    assert zlib.crc32(decoded.tobytes()) == digest


def test_sums_of_a_rotation_are_exact_at_the_largest_integers():
    encoding, _, _ = made_encoding("compact", True)
    weights = encoding.decoder["weights"]
    rng = np.random.default_rng(2)
    integers = rng.choice([-(2**15) - 128, 2**15 - 129], (50, 24))
    found = integers.astype(np.float64) @ weights
    for row, sums in zip(integers.tolist(), found, strict=True):
        exact = [
            sum(q * Fraction(w) for q, w in zip(row, column, strict=True))
            for column in weights.T.tolist()
        ]
        assert [Fraction(value) for value in sums.tolist()] == exact


def rows_of(block: int) -> dict[str, np.ndarray]:
    return toy_store.block_rows("coded", PLAN.blocks, block, PLAN.arrays)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("features/node_features", np.nan, "has a NaN or infinite value in"),
        ("features/node_features", 1e9, "profile q8 cannot hold .* faithful"),
        ("features/edge_to_node_features", -1e6, "profile compact cannot hold"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_sample(tmp_path, path, value, words):
    create_store(tmp_path / "toy.zarr", [PLAN], {})
    rows = rows_of(1)
    rows[path][5, 2] = value
    owner = np.searchsorted(
        np.cumsum(PLAN.blocks.n_atoms[PLAN.blocks.block_bounds[1] :]), 5, side="right"
    )
    sample = PLAN.sample_ids[int(PLAN.blocks.block_bounds[1] + owner)]
    writer = StoreWriter(tmp_path / "toy.zarr")
    with pytest.raises(DataError, match=f"Sample '{sample}' .*{words}"):
        writer.write_block("coded", 1, rows)
    assert 1 in writer.pending_blocks("coded")


def test_a_damaged_packed_chunk_is_named_and_nothing_else_lost(coded, tmp_path):
    victim = Path(shutil.copytree(coded, tmp_path / "toy.zarr"))
    path = "features/turned_features"
    name = f"coded/{path}/c/2/0/0"
    content = bytearray((victim / name).read_bytes())
    content[40] ^= 2
    (victim / name).write_bytes(content)
    intact = FeatureStore.open(coded).splits["coded"]
    split = FeatureStore.open(victim).splits["coded"]
    first, lost = PLAN.blocks.start, []
    for position in range(len(split)):
        try:
            got = split.read([position], [path])[path]
        except DamagedStoreError as error:
            lost.append(position)
            message = str(error)
        else:
            np.testing.assert_array_equal(got, intact.read([position], [path])[path])
    assert f"{name} has a damaged inner chunk 0" in message
    assert lost == [p for p in split.block_positions(2) if first[p] < 2 * 2048 + 1024]
    (one, two) = verify_store(victim)
    assert (one.split, one.block, one.file) == ("coded", 2, name)
    assert "does not match its commit record" in one.message
    assert "damaged inner chunk 0" in two.message


def test_chunks_are_kept_up_to_a_limit(coded, monkeypatch):
    decoded = []
    original = CompressedLayout.decode_chunk

    def counting(layout, stored):
        decoded.append(len(stored))
        return original(layout, stored)

    monkeypatch.setattr(CompressedLayout, "decode_chunk", counting)
    path = "features/edge_to_node_features"
    everyone = np.arange(PLAN.blocks.n_samples)
    roomy = FeatureStore.open(coded).splits["coded"]
    roomy.read(everyone, [path])
    once = len(decoded)
    roomy.read(everyone[::-1], [path])
    assert len(decoded) == once
    assert roomy.max_shuffle_blocks([path]) >= roomy.n_blocks
    assert roomy.max_shuffle_blocks(["features/node_features"]) is None
    # Room for one block: every pass over all of them decodes everything again.
    tight = FeatureStore.open(coded, cache_bytes=2048 * 24).splits["coded"]
    assert tight.max_shuffle_blocks([path]) == 1
    decoded.clear()
    for _ in range(2):
        for block in range(tight.n_blocks):
            tight.read(np.array(tight.block_positions(block)), [path])
    assert len(decoded) >= 2 * (once - 2)


def _edit(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (
            "coded/zarr.json",
            lambda d: d["attributes"]["kd_split"]["arrays"][1].update(profile="q4"),
            "lacks a usable 'kd_split'",
        ),
        (
            "coded/zarr.json",
            lambda d: d["attributes"]["kd_split"]["arrays"][1].update(tables=["mean"]),
            "lacks parameters of 'features/node_features'",
        ),
        (
            "coded/zarr.json",
            lambda d: d["attributes"]["kd_split"]["arrays"].pop(2),
            "plans 'features/node_features' without 'features/node_features_scale'",
        ),
        (
            "coded/features/turned_features/zarr.json",
            lambda d: d["codecs"][0]["configuration"]["codecs"][2][
                "configuration"
            ].update(shuffle="noshuffle"),
            "does not describe the array",
        ),
        (
            "coded/encodings/features/node_features/mean/zarr.json",
            lambda d: d.update(shape=[3]),
            "does not fit its array",
        ),
    ],
)
def test_inconsistent_encodings_are_damage(tmp_path, file, change, words):
    path = tmp_path / "toy.zarr"
    create_store(path, [PLAN], {})
    _edit(path / file, change)
    with pytest.raises(DamagedStoreError, match=words):
        FeatureStore.open(path, allow_unsealed=True)


def test_an_axis_has_one_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the two the decomposition gives: blocks of two plans must agree."""
    values = np.random.default_rng(3).normal(size=(4096, 24)).cumsum(1)
    found = calibrate(values.astype(np.float32), "compact", 1e-3).encoding
    eigh = np.linalg.eigh

    def turned(matrix: Any) -> tuple[Any, Any]:
        variances, columns = eigh(matrix)
        return variances, columns * np.where(np.arange(24) % 2, -1, 1)

    monkeypatch.setattr(np.linalg, "eigh", turned)
    again = calibrate(values.astype(np.float32), "compact", 1e-3).encoding
    assert found.rotation is not None
    np.testing.assert_array_equal(again.rotation, found.rotation)
