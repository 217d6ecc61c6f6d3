import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy_store
import xxhash
import zarr
from filelock import FileLock

from pipeline.errors import DamagedStoreError, DataError, SpecError, StoreError
from pipeline.store import creation as creation_module
from pipeline.store import index as index_module
from pipeline.store.reader import FeatureStore
from pipeline.store.shard import with_crc
from pipeline.store.verify import verify_store
from pipeline.store.writer import ArrayPlan, StoreWriter, create_store

PLAN = toy_store.plan("train")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planned") / "toy.zarr"
    create_store(path, [PLAN, toy_store.plan("val")], {"fingerprint": "abc"})
    assert [f.name for f in path.parent.iterdir()] == ["toy.zarr"]
    return path


@pytest.fixture
def planned(tmp_path: Path, template: Path) -> Path:
    """A store that is planned and has no blocks yet."""
    path = tmp_path / "toy.zarr"
    shutil.copytree(template, path)
    return path


def rows_of(block: int) -> dict[str, np.ndarray]:
    return toy_store.block_rows("train", PLAN.blocks, block, PLAN.arrays)


def first_sample(block: int) -> str:
    return PLAN.sample_ids[PLAN.blocks.block_bounds[block]]


def test_planned_store_has_all_metadata_and_nothing_else(planned: Path):
    writer = StoreWriter(planned)
    assert writer.attributes == {
        "format_version": 3,
        "complete": False,
        "fingerprint": "abc",
    }
    assert not writer.sealed
    assert writer.pending_blocks("train") == list(range(PLAN.blocks.n_blocks))
    assert not [
        f
        for f in planned.rglob("*")
        if f.is_file() and f.name.isdigit() and "index" not in f.parts
    ]


def test_commit_records_are_what_the_format_says(planned: Path):
    StoreWriter(planned).write_block("train", 1, rows_of(1))
    shards = [
        planned.joinpath("train", array.path, "c", "1", *["0"] * len(array.shape))
        for array in PLAN.arrays
    ]
    hashes = b"".join(xxhash.xxh3_128(s.read_bytes()).digest() for s in shards)
    record = planned / "train/index/commit/c/1/0/0"
    assert record.read_bytes() == with_crc(hashes)


def test_unsealed_store_is_refused_by_name_of_missing_blocks(planned: Path):
    writer = StoreWriter(planned)
    writer.write_block("train", 1, rows_of(1))
    blocks = ", ".join(str(b) for b in range(PLAN.blocks.n_blocks) if b != 1)
    with pytest.raises(StoreError) as caught:
        FeatureStore.open(planned)
    n_val = toy_store.plan("val").blocks.n_blocks
    val = ", ".join(str(b) for b in range(n_val))
    assert str(caught.value) == (
        f"{planned} lacks blocks {blocks} of split 'train' and blocks {val} of split "
        "'val'; continue it with `kd-cache build SPEC`."
    )
    reader = FeatureStore.open(planned, allow_unsealed=True).splits["train"]
    path = "features/node_features"
    got = reader.read(np.array(reader.block_positions(1)), [path])[path]
    np.testing.assert_array_equal(got, rows_of(1)[path])
    with pytest.raises(
        DamagedStoreError, match=f"c/0/0 is missing .*{first_sample(0)}"
    ):
        reader.read([0], [path])
    with pytest.raises(StoreError, match="lacks blocks 0"):
        writer.seal()


def test_complete_but_unsealed_store_says_so(tmp_path: Path):
    path = tmp_path / "toy.zarr"
    toy_store.build(path, ("val",))
    writer = StoreWriter(path)
    rows = toy_store.plan("val")
    writer.discard_block("val", 0)
    writer.write_block(
        "val", 0, toy_store.block_rows("val", rows.blocks, 0, rows.arrays)
    )
    with pytest.raises(StoreError, match="is complete but not sealed"):
        FeatureStore.open(path)
    writer.seal()
    writer.seal()
    assert FeatureStore.open(path).fingerprint == "f" * 64


def test_many_missing_blocks_are_counted(tmp_path: Path):
    path = tmp_path / "toy.zarr"
    many = toy_store.plan_blocks(np.full(30, 2), 2)
    plan = replace(
        PLAN,
        blocks=many,
        sample_ids=PLAN.sample_ids[:30],
        checksums=PLAN.checksums[:30],
    )
    create_store(path, [plan], {})
    with pytest.raises(StoreError, match=r"blocks 0, 1, .* 9 and 20 more of split"):
        FeatureStore.open(path)


def test_sealed_store_refuses_writing(sealed: Path):
    writer = StoreWriter(sealed)
    for attempt in (
        lambda: writer.write_block("train", 0, rows_of(0)),
        lambda: writer.claim_block("train", 0).__enter__(),
    ):
        with pytest.raises(StoreError, match=r"is sealed; .*--repair"):
            attempt()
    assert not (sealed / ".locks").exists()


def test_second_builder_of_a_block_is_refused(planned: Path):
    first, second = StoreWriter(planned), StoreWriter(planned)
    with first.claim_block("train", 1) as pending:
        assert pending
        with (
            pytest.raises(
                StoreError, match=r"Block 1 of split 'train' .*another process"
            ),
            second.claim_block("train", 1),
        ):
            pass
        with pytest.raises(StoreError, match="another process"):
            second.write_block("train", 1, rows_of(1))
        second.write_block("train", 0, rows_of(0))
        first.write_block("train", 1, rows_of(1))
    with second.claim_block("train", 1) as pending:
        assert not pending
    assert first.pending_blocks("train") == list(range(2, PLAN.blocks.n_blocks))


def test_opening_a_writer_removes_only_abandoned_files(planned: Path):
    held, free = "train/features/node_features/c", "train/labels/energy/c"
    orphans = [
        planned / held / "1" / ".0.abc.partial",
        planned / held / "2" / ".0.abc.partial",
        planned / free / ".1.abc.partial",
        planned / free / ".2.abc.partial",
        planned / ".zarr.json.abc.partial",
        planned / "train/index/commit/c/2/0/.0.abc.partial",
    ]
    for orphan in orphans:
        orphan.parent.mkdir(parents=True, exist_ok=True)
        orphan.write_bytes(b"x")
    beside = planned.parent / f".{planned.name}.xyz.partial"
    beside.mkdir()
    (planned.parent / f".{planned.name}.lock").touch()
    with StoreWriter.claim_block(StoreWriter(planned), "train", 2):
        pass
    for orphan in orphans:
        orphan.write_bytes(b"x")
    first = StoreWriter(planned)
    for orphan in orphans:
        orphan.write_bytes(b"x")
    with first.claim_block("train", 1):
        StoreWriter(planned)
        left = [orphan for orphan in orphans if orphan.exists()]
    assert left == [orphans[0], orphans[2]]
    assert not beside.exists()
    assert [f.name for f in planned.parent.iterdir()] == ["toy.zarr"]


def test_creation_waits_for_nobody_who_is_gone(tmp_path: Path):
    beside = tmp_path / ".toy.zarr.xyz.partial"
    beside.mkdir()
    (beside / "zarr.json").touch()
    create_store(tmp_path / "toy.zarr", [PLAN], {})
    assert [f.name for f in tmp_path.iterdir()] == ["toy.zarr"]


def test_writer_leaves_a_running_creation_alone(planned: Path):
    beside = planned.parent / f".{planned.name}.xyz.partial"
    beside.mkdir()
    with FileLock(planned.parent / f".{planned.name}.lock"):
        StoreWriter(planned)
        assert beside.exists()


def test_failed_creation_leaves_nothing(tmp_path: Path, monkeypatch):
    def fail(folder: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(creation_module, "_sync_tree", fail)
    with pytest.raises(OSError, match="disk full"):
        create_store(tmp_path / "toy.zarr", [PLAN], {})
    assert list(tmp_path.iterdir()) == []


def test_existing_store_is_not_planned_again(planned: Path):
    before = toy_store.contents(planned)
    with pytest.raises(StoreError, match=r"exists already; continue it with"):
        create_store(planned, [PLAN], {})
    assert toy_store.contents(planned) == before


@pytest.mark.parametrize(
    ("path", "value", "row"),
    [
        ("features/node_features", np.nan, 40),
        ("features/node_features", np.inf, 0),
        ("teacher/per_atom_energy", np.nan, 1000),
        ("structures/positions", -np.inf, 3),
        ("labels/forces", np.inf, 5),
    ],
)
def test_values_that_are_no_numbers_are_refused(planned: Path, path, value, row):
    rows = rows_of(0)
    rows[path] = rows[path].astype(np.float64)
    rows[path].reshape(len(rows[path]), -1)[row, 0] = value
    stop = np.searchsorted(PLAN.blocks.start, row, side="right")
    sample = PLAN.sample_ids[stop - 1]
    writer = StoreWriter(planned)
    words = f"Sample '{sample}' of split 'train' has a NaN or infinite .*'{path}'"
    with pytest.raises(DataError, match=words):
        writer.write_block("train", 0, rows)
    assert 0 in writer.pending_blocks("train")
    assert not list(planned.rglob("c/0/0"))


def test_missing_labels_are_nan(planned: Path):
    rows = rows_of(0)
    rows["labels/energy"][:] = np.nan
    rows["labels/forces"][3:9] = np.nan
    StoreWriter(planned).write_block("train", 0, rows)
    reader = FeatureStore.open(planned, allow_unsealed=True).splits["train"]
    got = reader.read(np.array(reader.block_positions(0)), ["labels/forces"])
    np.testing.assert_array_equal(got["labels/forces"], rows["labels/forces"])


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (
            "features/vector_features",
            65505.0,
            "above 65504 in PATH, too large for float16; .*`dtype: float32`",
        ),
        (
            "features/vector_features",
            -1e6,
            "above 65504 in PATH, too large for float16; .*`dtype: float32`",
        ),
        (
            "teacher/per_atom_energy",
            1e39,
            r"above 3.40282e\+38 in PATH, too large for float32; .*`dtype: float64`",
        ),
        ("structures/tags", 128, "a value in PATH that does not fit int8"),
        ("structures/atomic_numbers", -1, "a value in PATH that does not fit uint8"),
    ],
)
def test_values_too_large_for_their_dtype_are_refused(
    planned: Path, path, value, words
):
    rows = rows_of(1)
    wide = np.float64 if isinstance(value, float) else np.int64
    rows[path] = rows[path].astype(wide)
    rows[path].reshape(-1)[0] = value
    words = words.replace("PATH", repr(path))
    with pytest.raises(DataError, match=f"Sample '{first_sample(1)}' .*{words}"):
        StoreWriter(planned).write_block("train", 1, rows)


def test_largest_float16_and_narrow_integers_are_kept(planned: Path):
    rows = rows_of(0)
    features = rows["features/node_features"].astype(np.float32)
    features[0, 0] = 65504.0
    rows["features/node_features"] = features
    rows["structures/tags"] = rows["structures/tags"].astype(np.int64)
    StoreWriter(planned).write_block("train", 0, rows)
    reader = FeatureStore.open(planned, allow_unsealed=True).splits["train"]
    got = reader.read([0], ["features/node_features", "structures/tags"])
    assert got["features/node_features"][0, 0] == 65504.0
    assert got["structures/tags"].dtype == np.int8


@pytest.mark.parametrize(
    ("path", "change", "words"),
    [
        ("labels/forces", lambda a: a[:-1], r"has shape \(\d+, 3\), planned is"),
        ("labels/energy", lambda a: a[:, None], r"has shape \(\d+, 1\), planned is"),
        (
            "labels/forces",
            lambda a: a.astype(int),
            "has dtype int64, planned is float32",
        ),
        ("structures/tags", lambda a: a * 1.0, "has dtype float64, planned is int8"),
    ],
)
def test_wrong_shapes_and_kinds_are_refused(planned: Path, path, change, words):
    rows = rows_of(2)
    rows[path] = change(rows[path])
    with pytest.raises(
        StoreError, match=f"'{path}' of block 2 of split 'train' {words}"
    ):
        StoreWriter(planned).write_block("train", 2, rows)


def test_a_block_needs_exactly_the_planned_arrays(planned: Path):
    writer = StoreWriter(planned)
    rows = rows_of(0)
    rows["features/other"] = rows.pop("labels/energy")
    words = "missing or unplanned: features/other, labels/energy"
    with pytest.raises(StoreError, match=words):
        writer.write_block("train", 0, rows)
    with pytest.raises(StoreError, match="no split 'test'; it has train, val"):
        writer.write_block("test", 0, rows)
    with pytest.raises(StoreError, match="blocks 0 to 3, not 4"):
        writer.write_block("train", 4, rows)


def test_a_kill_while_rewriting_leaves_the_block_pending(planned: Path, monkeypatch):
    writer = StoreWriter(planned)
    writer.write_block("train", 0, rows_of(0))
    assert 0 not in writer.pending_blocks("train")
    from pipeline.store.shard import RawLayout

    def fail(layout: RawLayout, rows: np.ndarray, fill: float) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(RawLayout, "encode", fail)
    with pytest.raises(KeyboardInterrupt):
        writer.write_block("train", 0, rows_of(0))
    assert 0 in writer.pending_blocks("train")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"sample_ids": [*PLAN.sample_ids[:-1], PLAN.sample_ids[4]]},
            DataError,
            f"Sample id '{PLAN.sample_ids[4]}' occurs 2 times in split 'train'",
        ),
        ({"sample_ids": PLAN.sample_ids[1:]}, DataError, "150 samples but has 149 ids"),
        ({"checksums": PLAN.checksums[:9]}, DataError, "150 ids and 9 checksums"),
        ({"name": "../x"}, SpecError, r"'\.\./x' cannot be a folder"),
        ({"name": "digests"}, SpecError, "'digests' cannot be a folder"),
        ({"name": ""}, SpecError, "'' cannot be a folder"),
        ({"arrays": ()}, SpecError, "'train' has no arrays"),
        ({"arrays": PLAN.arrays[:1] * 2}, SpecError, "'structures/atomic_.* repeated"),
        (
            {"arrays": (ArrayPlan("index/x", "node", (), "int8"),)},
            SpecError,
            "'index/x' .* reserved",
        ),
        (
            {"arrays": (ArrayPlan("a//b", "node", (), "int8"),)},
            SpecError,
            "'a//b' .* not a valid name",
        ),
        (
            {"arrays": (ArrayPlan("a", "bond", (), "int8"),)},  # type: ignore[arg-type]
            SpecError,
            "level 'bond'",
        ),
        (
            {"arrays": (ArrayPlan("a", "node", (0,), "int8"),)},
            SpecError,
            r"shape \(0,\)",
        ),
        ({"arrays": (ArrayPlan("a", "node", (), "U4"),)}, SpecError, "dtype 'U4'"),
    ],
)
def test_impossible_plans_are_refused(tmp_path: Path, change, error, words):
    with pytest.raises(error, match=words):
        create_store(tmp_path / "toy.zarr", [replace(PLAN, **change)], {})
    assert list(tmp_path.iterdir()) == []


def test_impossible_roots_are_refused(tmp_path: Path):
    path = tmp_path / "toy.zarr"
    with pytest.raises(SpecError, match="at least one split"):
        create_store(path, [], {})
    with pytest.raises(SpecError, match="'train' is planned twice"):
        create_store(path, [PLAN, PLAN], {})
    with pytest.raises(SpecError, match="Attribute 'complete' is set by the store"):
        create_store(path, [PLAN], {"complete": True})
    with pytest.raises(SpecError, match="not plain JSON"):
        create_store(path, [PLAN], {"cutoff": float("nan")})


def test_only_feature_stores_are_opened(tmp_path: Path, planned: Path):
    with pytest.raises(
        StoreError, match=r"is not a feature store: it has no zarr\.json"
    ):
        FeatureStore.open(tmp_path / "nothing")
    root = planned / "zarr.json"
    document = json.loads(root.read_text())

    def put(**attributes: object) -> None:
        changed = {**document, "attributes": attributes}
        root.write_text(json.dumps(changed))

    put(other=1)
    for opener in (FeatureStore.open, StoreWriter, verify_store):
        with pytest.raises(StoreError, match="a Zarr group but not a feature store"):
            opener(planned)
    put(kd_cache={"format_version": 5, "complete": True}, kd_splits=["train"])
    for opener in (FeatureStore.open, StoreWriter, verify_store):
        with pytest.raises(
            StoreError, match=r"format version 5, .* reads versions up to 4; update"
        ):
            opener(planned)
    for header in ({"format_version": 0}, {"format_version": 1, "complete": 1}):
        put(kd_cache=header, kd_splits=["train"])
        with pytest.raises(
            DamagedStoreError, match="lacks its version, state or splits"
        ):
            FeatureStore.open(planned)
    root.write_text("[]")
    with pytest.raises(DamagedStoreError, match="is not a JSON object"):
        FeatureStore.open(planned)
    root.write_text("{}")
    with pytest.raises(DamagedStoreError, match="has no attributes"):
        FeatureStore.open(planned)
    root.write_text("{")
    with pytest.raises(DamagedStoreError, match="not readable as JSON"):
        FeatureStore.open(planned)


def test_store_without_fingerprint_says_so(tmp_path: Path):
    create_store(tmp_path / "toy.zarr", [PLAN], {})
    store = FeatureStore.open(tmp_path / "toy.zarr", allow_unsealed=True)
    with pytest.raises(StoreError, match="without a fingerprint; build it again"):
        _ = store.fingerprint


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("train/zarr.json", '"n_blocks"', '"n_block"', "lacks a usable 'kd_split'"),
        ("train/zarr.json", '"n_atoms": ', '"n_atoms": 1', "not the sum of its counts"),
        ("train/labels/forces/zarr.json", "float32", "floaty", "array that its split"),
        ("train/labels/forces/zarr.json", "1024", "512", "array that its split plans"),
        ("train/index/start/zarr.json", "int64", "int16", "start/zarr.json does not"),
        ("train/index/start/zarr.json", "150", "149", "the index of its split"),
    ],
)
def test_metadata_that_does_not_fit_is_damage(planned: Path, file, old, new, words):
    content = (planned / file).read_text()
    assert old in content
    (planned / file).write_text(content.replace(old, new, 1))
    with pytest.raises(DamagedStoreError, match=words):
        FeatureStore.open(planned, allow_unsealed=True)


def test_unsealed_index_is_checked_too(planned: Path):
    chunk = planned / "train/index/n_atoms/c/0"
    content = bytearray(chunk.read_bytes())
    content[8] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(
        DamagedStoreError, match="n_atoms/c/0 is missing or does not match"
    ):
        FeatureStore.open(planned, allow_unsealed=True)
    chunk.unlink()
    with pytest.raises(DamagedStoreError, match="n_atoms/c/0 is missing or"):
        FeatureStore.open(planned, allow_unsealed=True)


@pytest.mark.parametrize("key", ["sample_id", "start"])
def test_index_chunk_of_another_length_is_damage(planned: Path, key: str):
    (planned / f"train/index/{key}/c/0").write_bytes(with_crc(bytes(4)))
    with pytest.raises(DamagedStoreError, match=f"{key}/c/0 does not hold 150 values"):
        FeatureStore.open(planned, allow_unsealed=True)


def test_index_of_several_chunks(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(index_module, "INDEX_CHUNK", 64)
    path = tmp_path / "toy.zarr"
    toy_store.build(path, ("train",))
    assert sorted(f.name for f in (path / "train/index/start/c").iterdir()) == list(
        "012"
    )
    reader = FeatureStore.open(path).splits["train"]
    assert list(reader.sample_ids) == PLAN.sample_ids
    assert list(zarr.open_array(path / "train/index/sample_id")[:]) == PLAN.sample_ids
    np.testing.assert_array_equal(reader.n_atoms, PLAN.blocks.n_atoms)
    assert verify_store(path) == []
