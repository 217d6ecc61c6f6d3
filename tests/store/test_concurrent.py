"""Several processes at one store, and how two writers in one process see each other."""

from pathlib import Path

import pytest
import toy_store

from pipeline.errors import StoreError
from pipeline.store import ledger
from pipeline.store.reader import FeatureStore
from pipeline.store.verify import verify_store
from pipeline.store.writer import StoreWriter
from tests.faults import run_faults


def test_processes_that_share_a_store() -> None:
    """Writers end in the bytes of one process; readers never see a wrong number."""
    told = run_faults("together", "--count", 1)
    assert len(told) == 7
    for name, tally in told.items():
        assert (tally["rounds"], tally["failures"]) == (1, []), name
        assert tally["seen"].get("done") or tally["seen"]["read right"]
    assert told["two builds, own blocks"]["seen"] == {"done": 2, "refused": 0}
    assert told["two add-fields"]["seen"]["done"] >= 1
    assert told["reader, add-field"]["seen"]["read refused"] == 0


def test_what_another_writer_commits_while_one_looks_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written between two looks at the record."""
    path = tmp_path / "toy.zarr"
    toy_store.build(path, ("val",))
    truth = toy_store.contents(path)
    writer = StoreWriter(path)
    record = path / writer.splits["val"].record_name(1)
    content = record.read_bytes()
    writer.discard_block("val", 1)
    looks = []
    read_record = ledger.read_record

    def look(split, block):
        found = read_record(split, block)
        if block == 1:
            looks.append(found is not None)
            record.write_bytes(content)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "read_record", look)
        assert writer.pending_blocks("val", verify=True) == [1]
    assert looks[0] is False
    assert StoreWriter(path).pending_blocks("val", verify=True) == []
    toy_store.build(path, ("val",))
    assert toy_store.contents(path) == truth


def test_only_one_process_fills_all_blocks(tmp_path: Path) -> None:
    path = tmp_path / "toy.zarr"
    toy_store.build(path, ("val",))
    StoreWriter(path).discard_block("val", 0)
    first, second = StoreWriter(path), StoreWriter(path)
    with first.claim_all():
        with (
            pytest.raises(StoreError, match=r"being built by another .* --blocks"),
            second.claim_all(),
        ):
            pass
        with second.claim_block("val", 0) as missing:
            assert missing
    with second.claim_all():
        pass


def test_sealing_twice_leaves_one_seal_and_no_lock(tmp_path: Path) -> None:
    """A writer that looked before the seal was there, and comes after it."""
    path = tmp_path / "toy.zarr"
    toy_store.build(path, ("val",))
    truth = toy_store.contents(path)
    StoreWriter(path).discard_block("val", 0)
    late = StoreWriter(path)
    toy_store.build(path, ("val",))
    late.seal()
    with late.claim_all():
        pass
    with pytest.raises(StoreError, match="is sealed"), late.claim_block("val", 0):
        pass
    assert toy_store.contents(path) == truth
    assert verify_store(path) == []
    assert not (path / ".locks").exists()


def test_opening_survives_a_store_that_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exchange comes after the root was read and before the rest is."""
    path, other = tmp_path / "toy.zarr", tmp_path / "other.zarr"
    toy_store.build(path, ("val",))
    toy_store.build(other, ("val", "train"))
    read_digests = ledger.read_digests

    def exchanged(place):
        digests = read_digests(place)
        if other.exists():
            path.rename(tmp_path / "away")
            other.rename(path)
        return digests

    monkeypatch.setattr(ledger, "read_digests", exchanged)
    assert list(FeatureStore.open(path).splits) == ["val", "train"]
