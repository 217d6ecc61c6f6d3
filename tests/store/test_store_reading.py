import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import toy_store
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import StoreError
from pipeline.store.chunks import ChunkCache
from pipeline.store.reader import FeatureStore, SplitReader

SPLITS = toy_store.SPLITS
PLANS = {split: toy_store.plan(split) for split in SPLITS}


def expected_rows(split: str, positions, array) -> np.ndarray:
    order = PLANS[split].blocks.order
    values = [toy_store.value_of(split, int(order[p]), array) for p in positions]
    return toy_store.joined(values, array)


def check_read(reader: SplitReader, positions) -> None:
    arrays = toy_store.ARRAYS[reader.name]
    result = reader.read(positions, [array.path for array in arrays])
    assert list(result) == [array.path for array in arrays]
    for array in arrays:
        expected = expected_rows(reader.name, positions, array)
        assert result[array.path].dtype == array.dtype
        np.testing.assert_array_equal(result[array.path], expected)


@pytest.mark.parametrize("split", SPLITS)
def test_index_is_what_was_planned(store: FeatureStore, split: str):
    reader, plan = store.splits[split], PLANS[split]
    assert reader.name == split
    assert len(reader) == plan.blocks.n_samples
    assert list(reader.sample_ids) == plan.sample_ids
    np.testing.assert_array_equal(reader.n_atoms, plan.blocks.n_atoms)
    np.testing.assert_array_equal(reader.checksums, plan.checksums)
    assert reader.n_blocks == plan.blocks.n_blocks
    positions = [reader.block_positions(block) for block in range(reader.n_blocks)]
    assert [p for some in positions for p in some] == list(range(len(reader)))
    assert [p.start for p in positions] == plan.blocks.block_bounds[:-1].tolist()
    for position in range(0, len(reader), 13):
        assert reader.position(plan.sample_ids[position]) == position
    everyone = np.random.default_rng(2).permutation(len(reader))
    names = [plan.sample_ids[position] for position in everyone]
    np.testing.assert_array_equal(reader.positions(names), everyone)
    assert reader.positions([]).tolist() == []
    described = [(i.path, i.level, i.shape, i.dtype) for i in reader.arrays.values()]
    assert described == [
        (a.path, a.level, a.shape, np.dtype(a.dtype)) for a in plan.arrays
    ]


@given(st.sampled_from(SPLITS), st.data())
@settings(max_examples=120, deadline=None)
def test_samples_in_any_order_with_repeats(split: str, data: st.DataObject):
    n_samples = PLANS[split].blocks.n_samples
    positions = data.draw(st.lists(st.integers(0, n_samples - 1), max_size=40))
    check_read(STORES[split], np.array(positions, np.int64))


@pytest.fixture(autouse=True)
def _open_stores(store: FeatureStore):
    # hypothesis cannot take function fixtures; the store is the same for all tests.
    STORES.update(store.splits)


STORES: dict[str, SplitReader] = {}


@pytest.mark.parametrize("split", SPLITS)
def test_whole_blocks_and_the_whole_split(store: FeatureStore, split: str):
    reader = store.splits[split]
    paths = list(reader.arrays)
    for block in range(reader.n_blocks):
        positions = np.array(reader.block_positions(block))
        check_read(reader, positions)
        for path, rows in reader.read_block(block, paths).items():
            np.testing.assert_array_equal(rows, reader.read(positions, [path])[path])
    check_read(reader, range(len(reader)))
    check_read(reader, list(range(len(reader)))[::-1])
    check_read(reader, [])


def test_results_belong_to_the_caller(store: FeatureStore):
    reader = store.splits["train"]
    path = "features/node_features"
    first = reader.read([5], [path])[path]
    first[:] = 0
    assert reader.read([5], [path])[path].any()


@pytest.mark.parametrize("split", SPLITS)
def test_zarr_python_reads_the_same(sealed: Path, split: str):
    group = zarr.open_group(sealed, mode="r")
    plan = PLANS[split]
    blocks = plan.blocks
    index = group[f"{split}/index"]
    assert list(index["sample_id"][:]) == plan.sample_ids
    for array in plan.arrays:
        stored = group[f"{split}/{array.path}"]
        assert dict(stored.attrs) == array.attributes
        axis = {"sample": "index/sample_row", "edge": "edges/start"}
        first = group[f"{split}/{axis.get(array.level, 'index/start')}"][:]
        check_stored(stored[:], split, array, first)
    assert index["commit"].shape == (blocks.n_blocks, len(plan.arrays), 2)
    assert index["commit"][:].any(axis=(1, 2)).all()
    # Listing must not meet files that Zarr does not know (warnings are errors here).
    assert len(list(group.members(max_depth=None))) > 20


@pytest.mark.parametrize("split", SPLITS)
def test_tensorstore_reads_the_same(sealed: Path, split: str):
    tensorstore = pytest.importorskip("tensorstore")

    def read(path: str) -> np.ndarray:
        place = {"driver": "file", "path": str(sealed / split / path)}
        spec = {"driver": "zarr3", "kvstore": place}
        return tensorstore.open(spec, read=True).result().read().result()

    blocks = PLANS[split].blocks
    np.testing.assert_array_equal(read("index/start"), blocks.start)
    np.testing.assert_array_equal(read("index/n_atoms"), blocks.n_atoms)
    np.testing.assert_array_equal(read("index/sample_row"), blocks.sample_row)
    np.testing.assert_array_equal(read("index/checksum"), PLANS[split].checksums)
    for array in PLANS[split].arrays:
        axis = {"sample": "index/sample_row", "edge": "edges/start"}
        first = read(axis.get(array.level, "index/start"))
        check_stored(read(array.path), split, array, first)


def check_stored(stored, split: str, array, first) -> None:
    """Compare a whole array with the input, rows of no sample included.

    ``first`` is the first row of every sample on the array's own axis.
    """
    blocks = PLANS[split].blocks
    fill = np.nan if np.dtype(array.dtype).kind == "f" else 0
    expected = np.full(
        (blocks.n_blocks * blocks.rows(array.level), *array.shape), fill, array.dtype
    )
    for position, sample in enumerate(blocks.order):
        value = toy_store.value_of(split, int(sample), array)
        value = value[None] if array.level == "sample" else value
        expected[first[position] : first[position] + len(value)] = value
    assert stored.dtype == array.dtype
    np.testing.assert_array_equal(stored, expected)


def test_threads_read_a_fresh_store_at_once(sealed: Path):
    reader = FeatureStore.open(sealed).splits["train"]
    failures = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(6):
                check_read(reader, rng.integers(0, len(reader), 20))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_no_file_stays_open_and_maps_go_away(sealed: Path):
    inode = (sealed / "train/features/node_features/c/0/0").stat().st_ino
    files, maps = open_files(), maps_of(inode)
    fresh = FeatureStore.open(sealed)
    for split in SPLITS:
        check_read(fresh.splits[split], range(len(fresh.splits[split])))
    assert open_files() == files
    assert maps_of(inode) == maps + 1
    del fresh
    assert maps_of(inode) == maps


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def maps_of(inode: int) -> int:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split()[4] for line in lines].count(str(inode))


def test_cold_pages_are_asked_for_ahead(store: FeatureStore, monkeypatch):
    from pipeline.store import reader as module

    asked: list[int] = []
    faults = iter([1, 2, 2, 2])
    monkeypatch.setattr(module, "_COLD_READS", 1)
    monkeypatch.setattr(module, "disk_reads", lambda: next(faults))
    monkeypatch.setattr(
        module, "advise_will_need", lambda view: asked.append(len(view))
    )
    path = "features/node_features"
    reader = SplitReader(store.splits["train"].index, ChunkCache(0))
    reader.read([3], [path])
    asked.clear()
    monkeypatch.setattr(reader, "_disk_reads", 1)
    monkeypatch.setattr(reader, "_cold_reads", 0)
    reader.read([3], [path])
    assert sum(asked) == int(reader.n_atoms[3]) * 10
    asked.clear()
    reader.read([3], [path])
    assert asked == []


@pytest.mark.parametrize("outside", [-1, 150, 2**40])
def test_position_outside_the_split(store: FeatureStore, outside: int):
    with pytest.raises(StoreError, match=f"Position {outside} is outside.*'train'"):
        store.splits["train"].read([3, outside], ["labels/energy"])


def test_unknown_names_are_refused(store: FeatureStore):
    reader = store.splits["val"]
    with pytest.raises(StoreError, match=r"no array 'features/x'; it has structures/"):
        reader.read([0], ["features/x"])
    with pytest.raises(StoreError, match="no sample 'nobody'"):
        reader.position("nobody")
    with pytest.raises(StoreError, match="no sample 'zzz'"):
        reader.positions([str(reader.sample_ids[3]), "zzz", "a"])
    with pytest.raises(StoreError, match="blocks 0 to"):
        reader.block_positions(99)


def test_reading_needs_no_zarr_library(sealed: Path):
    program = (
        "import sys; from pipeline.store.reader import FeatureStore; "
        f"split = FeatureStore.open({str(sealed)!r}).splits['val']; "
        "split.read([0], ['labels/energy']); "
        "sys.exit('zarr' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
