"""Stores on their way: never taken for complete early, and the same at the end."""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import toy_store
from http_server import serving

from pipeline.cli.main import main
from pipeline.errors import DamagedStoreError, StoreError
from pipeline.store.backends import RemoteBackend
from pipeline.store.reader import FeatureStore
from pipeline.store.transfer import FolderTarget, copy_store, stage_store
from pipeline.store.verify import verify_store
from pipeline.store.writer import StoreWriter
from tests.commands import refusal, run_command

SPLITS = ("bonds", "val")
SHARD = "bonds/features/node_features/c/1/0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("transfer") / "toy.zarr"
    toy_store.build(path, SPLITS)
    return path


@pytest.fixture
def url() -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    yield "memory://bucket/copy.zarr"
    if memory.exists("/bucket"):
        memory.rm("/bucket", recursive=True)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and ".locks" not in file.parts
    }


def files_behind(url: str) -> dict[str, bytes]:
    mapper = fsspec.get_mapper(url)
    return {name: mapper[name] for name in mapper}


def test_a_copy_has_the_same_files(folder: Path, url: str, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    assert copy_store(folder, url, lambda *report: told.append(report))
    assert files_behind(url) == files_of(folder)
    assert verify_store(url) == []
    splits = FeatureStore.open(folder).splits
    assert sum(samples for _, samples, _ in told) == sum(map(len, splits.values()))
    assert [left for *_, left in told] == list(range(len(told) - 1, -1, -1))
    assert copy_store(url, tmp_path / "back.zarr")
    assert files_of(tmp_path / "back.zarr") == files_of(folder)


class _CutOffError(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 9, 60, 75, 110, 130, -2, -1])
def test_a_copy_that_is_cut_off_is_not_complete_and_goes_on(
    folder: Path, url: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = itertools.count()
    write = RemoteBackend.write
    limit = after % len(files_of(folder))

    def failing(self: RemoteBackend, name: str, content: bytes) -> None:
        if next(writes) >= limit:
            raise _CutOffError
        write(self, name, content)

    with monkeypatch.context() as patched:
        patched.setattr(RemoteBackend, "write", failing)
        with pytest.raises(_CutOffError):
            copy_store(folder, url)
    if files_behind(url).get("zarr.json") is None:
        with pytest.raises(StoreError, match="is not a feature store"):
            FeatureStore.open(url)
    else:
        with pytest.raises(StoreError, match=r"lacks blocks?|complete but not sealed"):
            FeatureStore.open(url)
    done = {n for n in files_behind(url) if "/commit/c/" in n}
    told: list[tuple[str, int, int]] = []
    assert copy_store(folder, url, lambda *report: told.append(report))
    blocks = sum(s.n_blocks for s in FeatureStore.open(folder).splits.values())
    assert len(told) == blocks - len(done)
    assert files_behind(url) == files_of(folder)
    assert verify_store(url) == []


def test_blocks_of_an_unfinished_store_are_copied_as_they_come(
    folder: Path, url: str, tmp_path: Path
) -> None:
    part = Path(shutil.copytree(folder, tmp_path / "part.zarr"))
    writer = StoreWriter(part)
    kept = (part / "bonds/index/commit/c/1/0/0").read_bytes()
    writer.discard_block("bonds", 1)
    assert not copy_store(part, url)
    with pytest.raises(StoreError, match="lacks block 1 of split 'bonds'"):
        FeatureStore.open(url)
    assert not copy_store(part, url)
    (part / "bonds/index/commit/c/1/0/0").write_bytes(kept)
    StoreWriter(part).seal()
    told: list[tuple[str, int, int]] = []
    assert copy_store(part, url, lambda *report: told.append(report))
    assert [name for name, *_ in told] == ["bonds"]
    assert verify_store(url) == []


def test_another_store_in_the_place_is_left_alone(
    folder: Path, url: str, tmp_path: Path
) -> None:
    other = tmp_path / "other.zarr"
    toy_store.build(other, ("val",))
    document = (other / "zarr.json").read_text()
    fingerprint = FeatureStore.open(other).fingerprint
    assert copy_store(other, url)
    before = files_behind(url)
    # Of the same plan but with other bytes, or another store altogether.
    changed = Path(shutil.copytree(other, tmp_path / "changed.zarr"))
    StoreWriter(changed).discard_block("val", 0)
    with pytest.raises(StoreError, match="another build of this store"):
        copy_store(changed, url)
    root = changed / "zarr.json"
    root.write_text(document.replace(fingerprint, "0" * len(fingerprint)))
    with pytest.raises((StoreError, DamagedStoreError)):
        copy_store(changed, url)
    assert files_behind(url) == before


def test_a_damaged_source_is_not_copied(folder: Path, url: str, tmp_path: Path) -> None:
    victim = Path(shutil.copytree(folder, tmp_path / "v.zarr"))
    content = bytearray((victim / SHARD).read_bytes())
    content[40] ^= 4
    (victim / SHARD).write_bytes(content)
    with pytest.raises(DamagedStoreError, match=f"{SHARD} does not match its commit"):
        copy_store(victim, url)
    with pytest.raises(StoreError, match="lacks block"):
        FeatureStore.open(url)


def test_a_store_is_staged_once_and_completely(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    with serving(folder.parent) as server:
        url = f"{server.url}/toy.zarr"
        place = stage_store(url, tmp_path)
        assert files_of(place) == files_of(folder)
        server.sent.clear()
        assert stage_store(url, tmp_path) == place
        shards = [n for n, _ in server.sent if "/features/" in n and "/c/" in n]
        assert shards == []
    assert FeatureStore.open(folder).fingerprint[:16] in place.name


def test_a_staging_that_is_cut_off_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = itertools.count()
    write = FolderTarget.write
    limit = len(files_of(folder)) - 9

    def failing(self: FolderTarget, name: str, content: bytes) -> None:
        if next(writes) >= limit:
            (self._folder / f".{Path(name).name}.x.partial").write_bytes(b"torn")
            raise _CutOffError
        write(self, name, content)

    with monkeypatch.context() as patched:
        patched.setattr(FolderTarget, "write", failing)
        with pytest.raises(_CutOffError):
            stage_store(folder, tmp_path)
    (place,) = tmp_path.glob("toy-*")
    with pytest.raises(StoreError, match="lacks block"):
        FeatureStore.open(place)
    assert stage_store(folder, tmp_path) == place
    assert files_of(place) == files_of(folder)


def test_an_unfinished_store_is_not_staged(folder: Path, tmp_path: Path) -> None:
    part = Path(shutil.copytree(folder, tmp_path / "part.zarr"))
    StoreWriter(part).discard_block("bonds", 1)
    with pytest.raises(StoreError, match="lacks block 1 of split 'bonds'"):
        stage_store(part, tmp_path / "stage")


def test_push_as_it_is_typed(folder: Path, tmp_path: Path, url: str) -> None:
    done = run_command(main, ["push", folder, url, "--verify"])
    assert done.exit_code == 0, done.output
    assert f"{url}: complete and sealed." in done.stdout
    assert f"{url}: everything checked, nothing damaged." in done.stdout
    assert (
        run_command(main, ["push", folder, f"file://{tmp_path}/c.zarr"]).exit_code == 0
    )
    assert files_of(tmp_path / "c.zarr") == files_of(folder)
    said = refusal(main, ["build", "x.yaml", "--out", url])
    assert said == (
        f"--out {url} is a URL, and a store is built on a local disk; build it there "
        f"and `kd-cache push STORE {url}`."
    )
    assert "is not a feature store" in refusal(main, ["push", tmp_path, url + "2"])


def test_several_processes_verify_as_one_does(folder: Path, tmp_path: Path) -> None:
    victim = Path(shutil.copytree(folder, tmp_path / "v.zarr"))
    content = bytearray((victim / SHARD).read_bytes())
    content[40] ^= 4
    (victim / SHARD).write_bytes(content)
    (victim / "val/labels/energy/c/0").unlink()
    alone = verify_store(victim)
    assert len(alone) == 3
    assert verify_store(victim, workers=2) == alone
    assert run_command(main, ["verify", folder, "--workers", "1"]).exit_code == 0
