"""Stores in a zip archive and behind URLs give what the folder gives."""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import toy_store
from http_server import FolderServer, serving

from pipeline.errors import DamagedStoreError, StoreError
from pipeline.files import remote
from pipeline.store.reader import FeatureStore, SplitReader
from pipeline.store.verify import verify_store

SPLITS = ("train", "bonds", "coded")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("places") / "toy.zarr"
    toy_store.build(path, SPLITS)
    return path


@pytest.fixture
def server(folder: Path) -> Iterator[FolderServer]:
    pytest.importorskip("aiohttp")
    with serving(folder.parent) as running:
        yield running


def zipped(
    folder: Path, file: Path, prefix: str, how: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(file, "w", how) as archive:
        for member in sorted(folder.rglob("*")):
            if member.is_file():
                archive.write(member, prefix + str(member.relative_to(folder)))
    return file


def check_equal(found: FeatureStore, wanted: FeatureStore) -> None:
    rng = np.random.default_rng(1)
    assert found.attributes == wanted.attributes
    for name, split in wanted.splits.items():
        other = found.splits[name]
        np.testing.assert_array_equal(other.sample_ids, split.sample_ids)
        for positions in (rng.permutation(len(split)), rng.integers(0, len(split), 9)):
            got = other.read(positions, list(split.arrays))
            for path, rows in split.read(positions, list(split.arrays)).items():
                np.testing.assert_array_equal(got[path], rows)


@pytest.mark.parametrize("prefix", ["", "toy.zarr/"])
def test_a_zip_archive_reads_like_its_folder(folder: Path, tmp_path: Path, prefix: str):
    file = zipped(folder, tmp_path / "toy.zip", prefix)
    check_equal(FeatureStore.open(file), FeatureStore.open(folder))
    assert verify_store(file) == []


def test_an_archive_of_the_zip_command(folder: Path, tmp_path: Path):
    if shutil.which("zip") is None:
        pytest.skip("no zip command")
    file = tmp_path / "toy.zip"
    subprocess.run(
        ["zip", "-0", "-q", "-r", file, folder.name], cwd=folder.parent, check=True
    )
    check_equal(FeatureStore.open(file), FeatureStore.open(folder))


def test_damage_in_an_archive_is_found(folder: Path, tmp_path: Path):
    file = zipped(folder, tmp_path / "toy.zip", "")
    name = "train/features/node_features/c/1/0"
    with zipfile.ZipFile(file) as archive:
        begin = archive.getinfo(name).header_offset + 30 + len(name)
    content = bytearray(file.read_bytes())
    content[begin + 7] ^= 1
    file.write_bytes(content)
    split = FeatureStore.open(file).splits["train"]
    with pytest.raises(DamagedStoreError, match=f"toy.zip/{name} has a damaged inner"):
        split.read(np.array(split.block_positions(1)), ["features/node_features"])
    assert {problem.file for problem in verify_store(file)} == {name}


def test_unusable_archives_are_refused(folder: Path, tmp_path: Path):
    squeezed = zipped(folder, tmp_path / "a.zip", "", zipfile.ZIP_DEFLATED)
    with pytest.raises(StoreError, match="compressed inside the archive; .*zip -0"):
        FeatureStore.open(squeezed)
    cut = tmp_path / "b.zip"
    cut.write_bytes(squeezed.read_bytes()[:-400])
    with pytest.raises(DamagedStoreError, match="cannot be read as a zip archive"):
        FeatureStore.open(cut)
    other = tmp_path / "c.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme", "nothing")
    with pytest.raises(StoreError, match="is not a feature store"):
        FeatureStore.open(other)


def test_a_store_behind_http_reads_like_its_folder(folder: Path, server: FolderServer):
    found = FeatureStore.open(f"{server.url}/toy.zarr")
    check_equal(found, FeatureStore.open(folder))
    # Every chunk travels once, whatever the order of samples.
    shards: dict[str, int] = {}
    for name, count in server.sent:
        if "/c/" in name and name.split("/")[3] in ("features", "labels"):
            shards[name] = shards.get(name, 0) + count
    for name, count in shards.items():
        assert count <= (folder.parent / name[1:]).stat().st_size, name
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    assert sum(count for _, count in server.sent) < 1.3 * size


def test_one_sample_over_http_needs_its_chunks_only(folder: Path, server: FolderServer):
    split = FeatureStore.open(f"{server.url}/toy.zarr").splits["train"]
    server.sent.clear()
    split.read([3], ["features/node_features"])
    ((name, count),) = server.sent
    assert name.startswith("/toy.zarr/train/features/node_features/c/")
    assert count == 1024 * 10 + 4


def test_verification_works_over_http(folder: Path, server: FolderServer):
    assert verify_store(f"{server.url}/toy.zarr") == []


def test_damage_over_http_is_found(folder: Path, tmp_path: Path):
    pytest.importorskip("aiohttp")
    victim = Path(shutil.copytree(folder, tmp_path / "toy.zarr"))
    with serving(tmp_path) as server:
        for name, word in {
            "train/features/node_features/c/1/0": "damaged inner chunk",
            "coded/features/turned_features/c/0/0/0": "damaged inner chunk",
        }.items():
            content = bytearray((victim / name).read_bytes())
            content[11] ^= 16
            (victim / name).write_bytes(content)
            split_name, path = name.split("/c/")[0].split("/", 1)
            split = FeatureStore.open(f"{server.url}/toy.zarr").splits[split_name]
            with pytest.raises(DamagedStoreError, match=f"{name} has a {word}"):
                split.read(range(len(split)), [path])
        (victim / "train/features/node_features/c/1/0").unlink()
        split = FeatureStore.open(f"{server.url}/toy.zarr").splits["train"]
        with pytest.raises(DamagedStoreError, match="c/1/0 is missing"):
            split.read(range(len(split)), ["features/node_features"])


def test_a_network_that_fails_now_and_then(
    folder: Path, server: FolderServer, monkeypatch
):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    split = FeatureStore.open(f"{server.url}/toy.zarr").splits["train"]
    server.failures = 2
    wanted = FeatureStore.open(folder).splits["train"]
    path = "features/node_features"
    np.testing.assert_array_equal(
        split.read([4], [path])[path], wanted.read([4], [path])[path]
    )
    server.failures = 10**6
    with pytest.raises(StoreError, match="does not answer .*check the address"):
        split.read(range(len(split)), [path])


def test_a_server_without_ranges_is_refused(folder: Path, server: FolderServer):
    server.ranges = False
    split = FeatureStore.open(f"{server.url}/toy.zarr").splits["train"]
    with pytest.raises(StoreError, match="server sends .* supports byte ranges"):
        split.read([3], ["features/node_features"])


def test_nothing_behind_the_url(server: FolderServer):
    with pytest.raises(StoreError, match="is not a feature store"):
        FeatureStore.open(f"{server.url}/nothing.zarr")
    with pytest.raises(StoreError, match="cannot be opened .*remote"):
        FeatureStore.open("nosuchprotocol://x/y.zarr")


def test_other_file_systems_of_fsspec(folder: Path):
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/copy.zarr", recursive=True)
    try:
        check_equal(FeatureStore.open("memory://copy.zarr"), FeatureStore.open(folder))
    finally:
        memory.rm("/copy.zarr", recursive=True)


def test_a_window_of_a_remote_store_fits_into_memory(server: FolderServer):
    url = f"{server.url}/toy.zarr"
    paths = ["features/node_features", "features/vector_features"]
    block = 2048 * (5 + 12) * 2
    tight = FeatureStore.open(url, cache_bytes=3 * block).splits["train"]
    assert tight.max_shuffle_blocks(paths) == 3
    assert _splits(url)["train"].max_shuffle_blocks(paths) > 1000


def _splits(url: str) -> dict[str, SplitReader]:
    return FeatureStore.open(url).splits


def test_local_stores_need_no_network_library(folder: Path):
    program = (
        "import sys; from pipeline.store.reader import FeatureStore; "
        f"FeatureStore.open({str(folder)!r}); "
        "sys.exit('fsspec' in sys.modules or 'aiohttp' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
