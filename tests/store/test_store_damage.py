import shutil
from pathlib import Path

import numpy as np
import pytest
import toy_store

from pipeline.errors import DamagedStoreError, PipelineError
from pipeline.store.backends import LocalBackend
from pipeline.store.metadata import read_split
from pipeline.store.reader import FeatureStore, SplitReader
from pipeline.store.verify import verify_store
from pipeline.store.writer import StoreWriter

Truth = dict[tuple[str, str], np.ndarray]


@pytest.fixture
def victim(sealed: Path, tmp_path: Path) -> Path:
    path = tmp_path / "toy.zarr"
    shutil.copytree(sealed, path)
    return path


@pytest.fixture(params=["train", "bonds", "coded"])
def small(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A sealed store of one split, quick to check many times."""
    path = tmp_path / "small.zarr"
    toy_store.build(path, (request.param,))
    return path


def read_all(store: FeatureStore):
    for name, split in store.splits.items():
        for path in stored_paths(split):
            yield (name, path), split.read_stored(range(len(split)), [path])[path]


def stored_paths(split: SplitReader) -> list[str]:
    return [
        one for path, info in split.arrays.items() for one in (path, *info.scale_arrays)
    ]


def damages(path: Path, rng: np.random.Generator):
    """Pairs (file, bytes to put there): two flipped bytes of each, many truncations."""
    for number, file in enumerate(sorted(f for f in path.rglob("*") if f.is_file())):
        content = file.read_bytes()
        for place in rng.integers(0, len(content), 2):
            flipped = bytearray(content)
            flipped[place] ^= 1 << int(rng.integers(8))
            yield file, bytes(flipped)
        if number % 2:
            yield file, content[: int(rng.integers(0, len(content)))]


def test_every_flip_and_truncation_is_found_and_never_read(small: Path):
    truth = dict(read_all(FeatureStore.open(small)))
    cases = list(damages(small, np.random.default_rng(0)))
    assert len(cases) > 140
    for file, content in cases:
        intact = file.read_bytes()
        file.write_bytes(content)
        case = f"{file.relative_to(small)}: {len(content)} of {len(intact)} bytes"
        found = findings(small)
        assert found, case
        raised = check_reading(small, truth)
        # Reading needs neither commit records nor chunks that are only fill.
        needless = "index/commit/c/" in str(file) or "(no sample of split" in found
        assert raised is not needless, case
        file.write_bytes(intact)
    assert verify_store(small) == []


def findings(path: Path) -> str:
    """What verification says, in one string; empty when it finds nothing."""
    try:
        return " ".join(str(problem) for problem in verify_store(path))
    except PipelineError as error:
        return str(error)


def check_reading(path: Path, truth: Truth) -> bool:
    """Whether reading everything raised; what was read must be right."""
    try:
        store = FeatureStore.open(path)
    except PipelineError:
        return True
    raised = False
    for name, split in store.splits.items():
        for array in stored_paths(split):
            try:
                content = split.read_stored(range(len(split)), [array])[array]
            except DamagedStoreError:
                raised = True
            else:
                np.testing.assert_array_equal(content, truth[name, array])
    return raised


def test_a_missing_file_is_found(small: Path):
    truth = dict(read_all(FeatureStore.open(small)))
    for file in sorted(f for f in small.rglob("*") if f.is_file())[::2]:
        away = small.parent / "away"
        file.rename(away)
        assert findings(small), file
        check_reading(small, truth)
        away.rename(file)


def test_only_samples_of_the_damaged_chunk_are_lost(victim: Path, store: FeatureStore):
    path = "features/node_features"
    split = store.splits["train"]
    chunk, row_bytes = 1024, 10
    file = victim / "train" / path / "c/1/0"
    content = bytearray(file.read_bytes())
    # Second inner chunk of block 1: rows 3072 to 4095 of the atom axis.
    content[chunk * row_bytes + 4 + 17] ^= 4
    file.write_bytes(content)
    reader = FeatureStore.open(victim).splits["train"]
    start = toy_store.plan("train").blocks.start
    lost = []
    for position in range(len(split)):
        try:
            got = reader.read([position], [path])[path]
        except DamagedStoreError as error:
            lost.append(position)
            message = str(error)
        else:
            np.testing.assert_array_equal(got, split.read([position], [path])[path])
    rows = [
        range(int(first), int(first) + int(n))
        for first, n in zip(start, split.n_atoms, strict=True)
    ]
    assert lost == [p for p, r in enumerate(rows) if r.start < 4096 and r.stop > 3072]
    first = repr(str(split.sample_ids[lost[0]]))
    assert f"{file} has a damaged inner chunk 1 (samples {first}, " in message
    assert f"and {len(lost) - 5} more of split 'train'" in message
    assert f"`kd-cache verify {victim} --repair`" in message
    assert "`kd-cache build SPEC` writes block 1 again" in message
    (*_, problem) = verify_store(victim)
    assert (problem.split, problem.block) == ("train", 1)
    assert "damaged inner chunk 1" in problem.message
    # Other arrays of the block are not affected.
    reader.read(lost, ["labels/forces"])


def test_discarded_block_is_built_again(victim: Path, sealed: Path):
    for name in ("train/features/vector_features/c/2/0/0", "val/structures/tags/c/1"):
        file = victim / name
        content = bytearray(file.read_bytes())
        content[50] ^= 1
        file.write_bytes(content)
    (victim / "train/labels/energy/c/0").unlink()
    record = victim / "train/index/commit/c/1/0/0"
    record.write_bytes(record.read_bytes()[:-1])
    problems = verify_store(victim)
    blocks = sorted({(p.split, p.block) for p in problems})
    assert blocks == [("train", 0), ("train", 1), ("train", 2), ("val", 1)]
    writer = StoreWriter(victim)
    for split, block in blocks:
        writer.discard_block(split, block)
    assert not writer.sealed
    assert not (victim / "digests/c/0").exists()
    assert writer.pending_blocks("train") == [0, 1, 2]
    assert writer.pending_blocks("val") == [1]
    toy_store.build(victim)
    assert toy_store.contents(victim) == toy_store.contents(sealed)


def test_verifying_pending_blocks_finds_changed_bytes(victim: Path, sealed: Path):
    file = victim / "train/features/node_features/c/1/0"
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    writer = StoreWriter(victim)
    assert writer.pending_blocks("train") == []
    assert writer.sealed
    assert writer.pending_blocks("train", verify=True) == [1]
    assert not writer.sealed
    assert writer.pending_blocks("train") == [1]
    toy_store.build(victim)
    assert toy_store.contents(victim) == toy_store.contents(sealed)


@pytest.mark.parametrize("workers", [0, 1])
def test_sealing_discards_a_block_that_changed_after_it_was_written(
    tmp_path: Path, workers: int
):
    path = tmp_path / "toy.zarr"
    toy_store.build(path, ("val",))
    writer = StoreWriter(path)
    writer.discard_block("val", 0)
    plan = toy_store.plan("val")
    rows = toy_store.block_rows("val", plan.blocks, 0, plan.arrays)
    writer.write_block("val", 0, rows)
    file = path / "val/structures/tags/c/0"
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(DamagedStoreError, match=r"Block 0 of split 'val' .* discarded"):
        writer.seal(workers)
    assert writer.pending_blocks("val") == [0]
    assert not writer.sealed
    writer.write_block("val", 0, rows)
    total = plan.blocks.n_blocks
    checked: list[tuple[int, int]] = []
    writer.seal(workers, lambda *told: checked.append(told))
    assert checked == [(done, total) for done in range(total + 1)]
    again: list[tuple[int, int]] = []
    assert verify_store(path, count=lambda *told: again.append(told)) == []
    assert again == checked


def test_verify_reports_an_unfinished_store(tmp_path: Path):
    path = tmp_path / "toy.zarr"
    toy_store.build(path, ("val",))
    StoreWriter(path).discard_block("val", 1)
    messages = [str(problem) for problem in verify_store(path)]
    assert messages == [
        f"{path} is not sealed; finish it with `kd-cache build SPEC`.",
        f"{path}/val/index/commit lacks block 1.",
    ]


def test_a_shortened_shard_is_pending_without_reading_it(victim: Path):
    file = victim / "train/features/node_features/c/1/0"
    file.write_bytes(file.read_bytes()[:-1])
    assert StoreWriter(victim).pending_blocks("train") == [1]


def test_rows_are_traced_to_their_samples(victim: Path):
    index = read_split(LocalBackend(victim), "train")
    owners: dict[int, str] = {}
    for name, start, n in zip(
        index.sample_ids, index.start, index.n_atoms, strict=True
    ):
        owners.update({row: str(name) for row in range(int(start), int(start + n))})
    for row in range(index.n_blocks * index.rows_per_block):
        expected = [owners[row]] if row in owners else []
        assert index.find_samples("node", row, row + 1) == expected
    named = [str(name) for name in index.sample_ids]
    for name, row in zip(named, index.sample_row.tolist(), strict=True):
        assert index.find_samples("sample", row, row + 1) == [name]
    assert index.find_samples("node", 0, 10**9) == named


def test_a_writer_clears_the_locks_that_a_killed_seal_left(victim: Path):
    (victim / ".locks").mkdir()
    (victim / ".locks/seal.lock").touch()
    StoreWriter(victim)
    assert not (victim / ".locks").exists()
