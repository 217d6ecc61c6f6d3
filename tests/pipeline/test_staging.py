"""Datasets behind URLs: fetched once, whole, and then what the files are."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from pipeline.build.build import build_store
from pipeline.datasets import open_split
from pipeline.errors import DataError
from pipeline.files import download as staging
from pipeline.files import remote
from pipeline.files.download import download
from pipeline.spec.cache_spec import load_spec
from pipeline.spec.sections import SplitSpec
from pipeline.store.reader import FeatureStore
from tests.frames import collision_frames, write_frames
from tests.store.http_server import FolderServer, serving
from tests.stores import spec_document, write_spec


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files are staged."""
    monkeypatch.setenv("KD_STAGE", str(tmp_path / "stage"))
    return tmp_path / "stage"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with two files of ten frames."""
    place = tmp_path / "data"
    place.mkdir()
    texts = collision_frames(20)
    write_frames(place / "a.extxyz.xz", texts[:10])
    write_frames(place / "b.extxyz", texts[10:])
    return place


@pytest.fixture
def server(data: Path) -> Iterator[FolderServer]:
    pytest.importorskip("aiohttp")
    with serving(data) as running:
        yield running


@pytest.fixture
def bucket(data: Path) -> Iterator[str]:
    """The same files in an object store."""
    memory = fsspec.filesystem("memory")
    memory.put(str(data), "/bucket", recursive=True)
    yield "memory://bucket"
    memory.rm("/bucket", recursive=True)


def _fetched(server: FolderServer) -> int:
    return sum(count for _, count in server.sent)


def test_a_file_is_fetched_once(server: FolderServer, data: Path, folder: Path) -> None:
    url = f"{server.url}/b.extxyz"
    place = download(url)
    assert place.name == "b.extxyz"
    assert place.is_relative_to(folder)
    assert place.read_bytes() == (data / "b.extxyz").read_bytes()
    assert _fetched(server) == place.stat().st_size
    assert download(url) == place
    assert _fetched(server) == place.stat().st_size


def test_a_folder_is_fetched_whole(bucket: str, data: Path, folder: Path) -> None:
    for url in (bucket, bucket + "/", f"file://{data}"):
        place = download(url)
        assert {file.name for file in place.iterdir()} == {"a.extxyz.xz", "b.extxyz"}
        for file in place.iterdir():
            assert file.read_bytes() == (data / file.name).read_bytes()
    assert not list(folder.glob("*.partial"))


def test_a_transfer_that_is_cut_off_goes_on_where_it_stopped(
    server: FolderServer, data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(staging, "PIECE", 1000)
    url, size = f"{server.url}/b.extxyz", (data / "b.extxyz").stat().st_size
    pieces = -(-size // 1000)
    assert pieces > 4
    open_ = fsspec.get_filesystem_class("http")._cat_file
    asked: list[int] = []

    async def failing(self, path, start=None, end=None, **options):
        asked.append(start)
        if len(asked) > 3:
            raise OSError("the cable is out")
        return await open_(self, path, start=start, end=end, **options)

    with monkeypatch.context() as patched:
        patched.setattr(fsspec.get_filesystem_class("http"), "_cat_file", failing)
        fsspec.get_filesystem_class("http").clear_instance_cache()
        with pytest.raises(DataError, match="does not answer .*the cable is out"):
            download(url)
    fsspec.get_filesystem_class("http").clear_instance_cache()
    assert [file.suffix for file in folder.iterdir() if file.is_dir()] == [".partial"]
    server.sent.clear()
    assert download(url).read_bytes() == (data / "b.extxyz").read_bytes()
    assert len(server.sent) == pieces - 3


def test_of_several_that_ask_at_once_one_fetches(
    server: FolderServer, folder: Path
) -> None:
    url = f"{server.url}/b.extxyz"
    places: list[Path] = []
    threads = [
        threading.Thread(target=lambda: places.append(download(url))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(places) == 4
    assert len(set(places)) == 1
    assert _fetched(server) == places[0].stat().st_size


def test_what_changed_is_fetched_anew(bucket: str, data: Path, folder: Path) -> None:
    before = download(bucket)
    write_frames(data / "b.extxyz", collision_frames(3, first=40))
    fsspec.filesystem("memory").put(str(data / "b.extxyz"), "/bucket/b.extxyz")
    after = download(bucket)
    assert after != before
    assert (after / "b.extxyz").read_bytes() == (data / "b.extxyz").read_bytes()
    # A local file of the same size is told apart by its time.
    url = f"file://{data / 'b.extxyz'}"
    place = download(url)
    os.utime(data / "b.extxyz", (5, 5))
    assert download(url) != place


def test_nothing_there_or_no_ranges(
    server: FolderServer, bucket: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in (f"{server.url}/c.extxyz", f"{bucket}/c", "memory://nowhere/d"):
        with pytest.raises(DataError, match=f"{url} does not exist"):
            download(url)
    with pytest.raises(DataError, match="cannot be opened .*remote"):
        download("nosuchprotocol://x/y.extxyz")
    server.ranges = False
    monkeypatch.setattr(staging, "PIECE", 100)
    with pytest.raises(DataError, match="server sends .* supports byte ranges"):
        download(f"{server.url}/b.extxyz")


def test_a_store_of_a_url_is_that_of_the_files(
    bucket: str, data: Path, folder: Path, tmp_path: Path
) -> None:
    stores = []
    for name, path in {"far": bucket, "near": str(data)}.items():
        split = {"format": "extxyz", "path": path}
        document = spec_document({"train": split}, tmp_path / f"{name}.zarr")
        spec = load_spec(write_spec(tmp_path / f"{name}.yaml", document))
        assert spec.splits["train"].path == path
        assert build_store(spec)
        stores.append(FeatureStore.open(spec.store.path))
    far, near = (store.splits["train"] for store in stores)
    assert stores[0].fingerprint == stores[1].fingerprint
    assert far.sample_ids.tolist() == near.sample_ids.tolist()
    assert far.checksums.tolist() == near.checksums.tolist()


def test_a_split_of_one_remote_file(
    server: FolderServer, data: Path, folder: Path
) -> None:
    split = SplitSpec(format="extxyz", path=f"{server.url}/a.extxyz.xz")
    near = SplitSpec(format="extxyz", path=str(data / "a.extxyz.xz"))
    assert list(open_split(split).sample_ids) == list(open_split(near).sample_ids)
