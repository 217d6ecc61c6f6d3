"""Writes a planned store block by block and seals it; the only module that changes one.

Several writers may work at once on different blocks. A block counts once its commit
record is on disk, which is written after all of its shards.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
from filelock import FileLock, Timeout

from pipeline.errors import BusyError, DamagedStoreError, StoreError
from pipeline.files.atomic import make_folder_durably, sync_folder, write_atomically
from pipeline.parallel.ordered_map import (
    Count,
    OrderedMap,
    Tally,
    ignore_counts,
    processes,
)
from pipeline.store.backends import LocalBackend
from pipeline.store.creation import create_store, remove_leftovers
from pipeline.store.edges import CELL_OFFSETS, EDGE_INDEX, edge_faults
from pipeline.store.index import (
    METADATA,
    ROOT_KEY,
    SPLITS_KEY,
    SplitIndex,
)
from pipeline.store.ledger import (
    DIGEST_FILE,
    encode_digests,
    encode_record,
    is_committed,
    list_protected_files,
    shard_hash,
    unsealed_message,
)
from pipeline.store.metadata import read_json, read_root, read_split
from pipeline.store.plan import ArrayPlan, SplitPlan
from pipeline.store.reused_shards import ReusedShards
from pipeline.store.rows import encode_rows
from pipeline.store.shard import Buffer

__all__ = ["ArrayPlan", "SplitPlan", "StoreWriter", "create_store"]

_LOCKS = ".locks"
_SEAL = "seal"
_ALL = "all"


class StoreWriter:
    """An existing store opened for writing; leftovers of killed writers are removed."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._place = LocalBackend(self.path)
        root = read_root(self._place)
        self.splits: dict[str, SplitIndex] = {
            name: read_split(self._place, name) for name in root[SPLITS_KEY]
        }
        self._claimed: set[tuple[str, int]] = set()
        self._sweep()

    @property
    def attributes(self) -> dict[str, Any]:
        """The root attribute ``kd_cache`` as it is on disk now."""
        return dict(read_root(self._place)[ROOT_KEY])

    @property
    def sealed(self) -> bool:
        """Whether the store is complete and closed to writing."""
        return bool(self.attributes["complete"])

    def pending_blocks(
        self, split: str, verify: bool = False, among: range | None = None
    ) -> list[int]:
        """Blocks that are still to be written, ``among`` these, in ascending order.

        A committed block counts as done when its shards exist with their full size;
        with ``verify`` their bytes must also match the commit record, and a block that
        does not match is discarded (which opens a sealed store again).
        """
        index = self._split(split)
        pending = []
        for block in range(index.n_blocks) if among is None else among:
            if not is_committed(index, block):
                pending.append(block)
            elif verify and not is_committed(index, block, verify):
                # Asked in this order: what another writer commits in between stays.
                pending.append(block)
                self.discard_block(split, block)
        return pending

    @contextmanager
    def claim_all(self) -> Iterator[None]:
        """Keep out whoever else would fill all blocks; single blocks stay free.

        Raises
        ------
        StoreError
            Another process is at it.
        """
        with self._lock(_ALL) as held:
            if not held:
                raise StoreError(
                    f"{self.path} is being built by another process; wait for it, or "
                    "share the work with --blocks."
                )
            yield

    @contextmanager
    def claim_block(self, split: str, block: int) -> Iterator[bool]:
        """Keep a block to this writer; yields whether it still has to be written.

        Raises
        ------
        BusyError
            Another writer holds the block.
        StoreError
            The store is sealed.
        """
        index = self._split(split)
        index.block_positions(block)
        self._refuse_if_sealed()
        with self._lock(f"{split}.{block}") as held:
            if not held:
                raise BusyError(
                    f"Block {block} of split {split!r} of {self.path} is being written "
                    "by another process; wait for it or build other blocks."
                )
            self._refuse_if_sealed()
            self._claimed.add((split, block))
            try:
                yield not is_committed(index, block)
            finally:
                self._claimed.discard((split, block))

    def write_block(
        self,
        split: str,
        block: int,
        arrays: Mapping[str, npt.NDArray[Any]],
        adopted: ReusedShards | None = None,
    ) -> None:
        """Write all shards of a block, then its commit record; durable on return.

        ``arrays`` gives for every array of the split the rows of the block's samples
        in storage order: (atoms of the block, *shape), (edges of it, *shape) or
        (samples of it, *shape). Edges of a sample come sorted by (target, source,
        shift), as many as were planned. Arrays that are ``adopted`` are not given.
        """
        if (split, block) not in self._claimed:
            with self.claim_block(split, block):
                self.write_block(split, block, arrays, adopted)
            return
        self._refuse_if_sealed()
        index = self._split(split)
        taken = set() if adopted is None else set(adopted.paths)
        if arrays.keys() != index.fields.keys() - taken:
            wrong = sorted(arrays.keys() ^ (index.fields.keys() - taken))
            raise StoreError(
                f"Block {block} of split {split!r} needs exactly the planned arrays; "
                f"missing or unplanned: {', '.join(wrong)}."
            )
        rows: dict[str, npt.NDArray[Any]] = {}
        for path, given in arrays.items():
            rows |= encode_rows(index, block, index.fields[path], given)
        if EDGE_INDEX in rows:
            _check_edges(index, block, rows)
        record = self.path / index.record_name(block)
        if record.exists():
            # Shards are about to change, so the old record must not vouch for them.
            record.unlink()
            sync_folder(record.parent)
        hashes = self._write_shards(index, block, rows, adopted)
        _write_durably(record, encode_record(hashes), self.path)

    def _write_shards(
        self,
        index: SplitIndex,
        block: int,
        rows: dict[str, npt.NDArray[Any]],
        adopted: ReusedShards | None,
    ) -> list[tuple[int, int]]:
        """Hashes of the shards of a block, all durable; one is written behind."""
        hashes = []
        with ThreadPoolExecutor(1) as disk:
            writing: Future[None] | None = None
            for path, info in index.arrays.items():
                file = self.path / index.shard_name(path, block)
                if adopted is not None and path in adopted.paths:
                    make_folder_durably(file.parent, self.path)
                    hashes.append(adopted.put(path, block, file, index.hashing))
                    continue
                shard = index.layout(path).encode(rows.pop(path), info.fill)
                hashes.append(shard_hash(shard, index.hashing))
                if writing is not None:
                    writing.result()
                writing = disk.submit(_write_durably, file, shard, self.path)
            if writing is not None:
                writing.result()
        return hashes

    def discard_block(self, split: str, block: int) -> None:
        """Forget a block, so that the next build writes it again; unseals the store."""
        index = self._split(split)
        index.block_positions(block)
        if self.sealed:
            write_atomically(self.path / METADATA, self._root_bytes(complete=False))
        (self.path / DIGEST_FILE).unlink(missing_ok=True)
        record = self.path / index.record_name(block)
        if record.exists():
            record.unlink()
            sync_folder(record.parent)

    def seal(self, workers: int = 0, count: Count = ignore_counts) -> None:
        """Mark the store complete after checking every shard against its record.

        Shards are read by so many ``workers``, or by this process; ``count`` is told
        of the blocks.

        Raises
        ------
        StoreError
            Blocks are missing.
        DamagedStoreError
            A block is not what was written; it is discarded.
        """
        if self.sealed:
            return
        splits = self.splits.values()
        tally = Tally(count, sum(index.n_blocks for index in splits))
        with processes(workers) as run:
            for index in splits:
                self._check_committed(index, run, tally)
        with self._lock(_SEAL, wait=True):
            # Another process may have been faster, with the same bytes.
            if not self.sealed:
                self._write_seal()

    def _write_seal(self) -> None:
        files = list_protected_files(split.files for split in self.splits.values())
        root = self._root_bytes(complete=True)

        def content_of(name: str) -> bytes:
            return root if name == METADATA else (self.path / name).read_bytes()

        digests = encode_digests(files, content_of)
        _write_durably(self.path / DIGEST_FILE, digests, self.path)
        write_atomically(self.path / METADATA, root)

    def _check_committed(
        self, index: SplitIndex, run: OrderedMap, tally: Tally
    ) -> None:
        blocks = range(index.n_blocks)
        if any(not is_committed(index, block) for block in blocks):
            raise StoreError(unsealed_message(self._place, self.splits.values()))
        sound = run(partial(is_committed, index, verify=True), blocks)
        for block, good in zip(blocks, sound, strict=True):
            tally.add()
            if not good:
                self.discard_block(index.name, block)
                raise DamagedStoreError(
                    f"Block {block} of split {index.name!r} of {self.path} changed "
                    "after it was written and was discarded; write it again with "
                    "`kd-cache build SPEC`."
                )

    def _split(self, name: str) -> SplitIndex:
        if name not in self.splits:
            known = ", ".join(self.splits)
            raise StoreError(f"{self.path} has no split {name!r}; it has {known}.")
        return self.splits[name]

    def _refuse_if_sealed(self) -> None:
        if self.sealed:
            raise StoreError(
                f"{self.path} is sealed; to change a block run `kd-cache verify "
                f"{self.path} --repair` or build another store."
            )

    def _root_bytes(self, complete: bool) -> bytes:
        document = read_json(self._place, METADATA)
        document["attributes"][ROOT_KEY]["complete"] = complete
        return json.dumps(document, indent=2).encode()

    @contextmanager
    def _lock(self, name: str, wait: bool = False) -> Iterator[bool]:
        folder = self.path / _LOCKS
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()
            self._remove_needless_locks()

    def _remove_needless_locks(self) -> None:
        """A sealed store has no locks, whoever came too late to see that it is one."""
        if self.sealed:
            shutil.rmtree(self.path / _LOCKS, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove half-written files, except those of blocks that someone holds."""
        remove_leftovers(self.path)
        for orphan in self.path.rglob("*.partial"):
            with self._lock(self._owner(orphan)) as held:
                if held:
                    orphan.unlink(missing_ok=True)
        self._remove_needless_locks()

    def _owner(self, orphan: Path) -> str:
        """Name of the lock under which this half-written file was made."""
        split, *parts = orphan.relative_to(self.path).parts
        if split not in self.splits or "c" not in parts:
            return _SEAL
        key = parts[parts.index("c") + 1]
        # A one-axis array keeps `c/7` and its `c/.7.x.partial` in one folder.
        return f"{split}.{key.lstrip('.').split('.')[0]}"


def _check_edges(
    index: SplitIndex, block: int, rows: Mapping[str, npt.NDArray[Any]]
) -> None:
    for what, sample in edge_faults(index, block, rows[EDGE_INDEX], rows[CELL_OFFSETS]):
        raise StoreError(
            f"Sample {sample!r} of split {index.name!r} {what}; the teacher must give "
            "every sample the edges that were counted when the store was planned."
        )


def _write_durably(file: Path, content: Buffer, root: Path) -> None:
    make_folder_durably(file.parent, root)
    write_atomically(file, content)
