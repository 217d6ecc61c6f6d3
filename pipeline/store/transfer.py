"""Copies a store to another place block by block: to a URL, or from one to a disk.

The copy is written as a store is: metadata and index, then shards and the commit record
of each block, and at last the root that calls it complete. So it never passes for what
it is not, and a copy that was cut off goes on where it stopped.
"""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from pipeline.errors import StoreError
from pipeline.files.atomic import (
    disk_full_as_error,
    make_folder_durably,
    write_atomically,
)
from pipeline.files.remote import is_url
from pipeline.parallel.signals import Stopped
from pipeline.store.backends import (
    LocalBackend,
    RemoteBackend,
    StorageBackend,
    ZipBackend,
    open_backend,
)
from pipeline.store.index import METADATA, ROOT_KEY, SplitIndex
from pipeline.store.ledger import (
    DIGEST_FILE,
    is_committed,
    list_protected_files,
    read_record,
    shard_damage,
    shard_hash,
)
from pipeline.store.metadata import read_json
from pipeline.store.reader import FeatureStore

log = logging.getLogger("pipeline.store")
BlockCallback = Callable[[str, int, int], None]

# Blocks on the way; each has one shard in memory.
_AT_ONCE = 4


class Target(ABC):
    """A place that can be written to."""

    place: StorageBackend

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Put a whole file there, or nothing."""


class FolderTarget(Target):
    """A folder on a file system."""

    def __init__(self, folder: Path) -> None:
        self.place = LocalBackend(folder)
        self._folder = folder

    def write(self, name: str, content: bytes) -> None:
        """Put a whole file there, durable on return."""
        file = self._folder / name
        make_folder_durably(file.parent, self._folder)
        write_atomically(file, content)


class RemoteTarget(Target):
    """A folder behind a URL; object stores show an object once it is all there."""

    def __init__(self, url: str) -> None:
        self.place: RemoteBackend = RemoteBackend(url)

    def write(self, name: str, content: bytes) -> None:
        """Put a whole file there."""
        self.place.write(name, content)


def copy_store(
    source: Path | str,
    target: Path | str,
    report: BlockCallback = lambda split, samples, blocks_left: None,
) -> bool:
    """Copy the finished blocks of ``source`` that ``target`` lacks; True once all are.

    Each is a folder or a URL, and ``source`` may be a zip archive. Every shard is
    compared with its commit record on the way. A finished copy is sealed, and its
    metadata read back.

    Raises
    ------
    StoreError
        There is no store, or another one at ``target``, or it cannot be written to.
    DamagedStoreError
        Bytes of the source are not those that were written.
    """
    origin = open_backend(source)
    store = FeatureStore.open(source, allow_unsealed=True)
    splits = [split.index for split in store.splits.values()]
    destination = _target(target)
    copy = _Copy(origin, destination, store, splits)
    if copy.is_done():
        return True
    copy.begin()
    missing = copy.missing_blocks()
    threads = ThreadPoolExecutor(_AT_ONCE)
    wait = True
    try:
        done = threads.map(lambda item: copy.block(*item), missing)
        for number, (index, samples) in enumerate(done, 1):
            report(index.name, samples, len(missing) - number)
    except Stopped:
        wait = False  # a block counts once its record is there
        raise
    finally:
        threads.shutdown(wait, cancel_futures=True)
    if not store.attributes["complete"]:
        return False
    copy.seal()
    FeatureStore.open(target)
    log.info("%s: complete and sealed", target)
    return True


def stage_store(
    source: Path | str,
    folder: Path,
    report: BlockCallback = lambda split, samples, blocks_left: None,
) -> Path:
    """Local copy of the finished store at ``source``, in ``folder``; made if missing.

    It is named by the store's fingerprint. Of several processes, one copies.

    Raises
    ------
    StoreError
        The store is not finished, or the disk is full.
    DamagedStoreError
        Bytes are not those that were written.
    """
    store = FeatureStore.open(source)
    stem = str(store.path).rstrip("/").rpartition("/")[2].split(".")[0]
    place = folder / f"{stem}-{store.fingerprint[:16]}.zarr"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{place.name}.lock"), disk_full_as_error(place):
        for orphan in place.rglob("*.partial"):
            orphan.unlink()
        copy_store(source, place, report)
    return place


def _target(target: Path | str) -> Target:
    if is_url(target) and not str(target).startswith("file://"):
        return RemoteTarget(str(target))
    return FolderTarget(Path(str(target).removeprefix("file://")))


class _Copy:
    """One store on its way from ``origin`` to ``target``."""

    def __init__(
        self,
        origin: StorageBackend,
        target: Target,
        store: FeatureStore,
        splits: list[SplitIndex],
    ) -> None:
        self._origin = origin
        self._target = target
        self._sealed = bool(store.attributes["complete"])
        self._fingerprint = store.fingerprint
        self._splits = splits
        records = {s.record_name(b) for s in splits for b in range(s.n_blocks)}
        protected = list_protected_files(split.files for split in splits)
        self._small = [n for n in protected if n not in records and n != METADATA]

    def is_done(self) -> bool:
        """Whether the target holds the whole store already.

        Raises
        ------
        StoreError
            It holds another.
        """
        place = self._target.place
        if place.size(METADATA) is None:
            return False
        root = read_json(place, METADATA)
        header = root.get("attributes", {}).get(ROOT_KEY, {})
        if header.get("fingerprint") != self._fingerprint:
            self._refuse("another store")
        if header.get("complete"):
            same = self._sealed and place.read(DIGEST_FILE) == self._origin.read(
                DIGEST_FILE
            )
            if not same:
                self._refuse("another build of this store, which is complete")
            return True
        if _contents(place, self._small) != _contents(self._origin, self._small):
            self._refuse("another build of this store")
        return False

    def begin(self) -> None:
        """Metadata and index, then a root that calls the store unfinished."""
        if self._target.place.size(METADATA) is None:
            for name, content in _contents(self._origin, self._small).items():
                self._target.write(name, content)
            root = read_json(self._origin, METADATA)
            root["attributes"][ROOT_KEY]["complete"] = False
            self._target.write(METADATA, json.dumps(root, indent=2).encode())

    def missing_blocks(self) -> list[tuple[SplitIndex, int]]:
        """Blocks that the origin has finished and the target not."""
        return [
            (split, block)
            for split in self._splits
            for block in self._unlike(split)
            if self._sealed or is_committed(split, block)
        ]

    def block(self, split: SplitIndex, block: int) -> tuple[SplitIndex, int]:
        """Copy a block's shards, then its commit record; returns split and samples."""
        record = read_record(split, block)
        if record is None:
            raise StoreError(f"{self._origin} lacks block {block} of {split.name!r}.")
        for path, expected in zip(split.arrays, record.tolist(), strict=True):
            name = split.shard_name(path, block)
            try:
                content = self._origin.read(name)
            except FileNotFoundError:
                raise shard_damage(self._origin, name, "is missing", block) from None
            if shard_hash(content, split.hashing) != tuple(expected):
                what = "does not match its commit record"
                raise shard_damage(self._origin, name, what, block)
            self._target.write(name, content)
        record_name = split.record_name(block)
        self._target.write(record_name, self._origin.read(record_name))
        return split, len(split.block_positions(block))

    def seal(self) -> None:
        """Digests, then the root that calls the store complete."""
        for name in (DIGEST_FILE, METADATA):
            self._target.write(name, self._origin.read(name))

    def _unlike(self, split: SplitIndex) -> list[int]:
        """Blocks whose commit record at the target is not the origin's."""
        names = [split.record_name(block) for block in range(split.n_blocks)]
        there = _contents(self._target.place, names)
        here = _contents(self._origin, names) if there else {}
        return [
            block
            for block, name in enumerate(names)
            if name not in there or there[name] != here.get(name)
        ]

    def _refuse(self, what: str) -> None:
        raise StoreError(
            f"{self._target.place} holds {what}; choose another place or remove it."
        )


def _contents(place: StorageBackend, names: list[str]) -> dict[str, bytes]:
    """Contents of the small files that are there, by name."""
    if not isinstance(place, LocalBackend | ZipBackend):
        return place.fetch(names)
    return {name: place.read(name) for name in names if place.size(name) is not None}
