"""Shards of another store taken over as they are, after a look at their bytes."""

import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.files.atomic import sync_folder, write_atomically
from pipeline.store.index import SplitIndex
from pipeline.store.ledger import read_record, shard_damage, shard_hash


@dataclass(frozen=True)
class ReusedShards:
    """Arrays that a split takes from ``source``, a split with the same blocks.

    With ``link`` both stores share one file, which is safe since no writer ever changes
    a file in place; where that cannot be, and without it, bytes are copied.
    """

    source: SplitIndex
    paths: Collection[str]
    link: bool = False

    def put(self, path: str, block: int, file: Path, hashing: str) -> tuple[int, int]:
        """Make ``file`` the shard of ``path``, durable on return; returns its hash.

        Raises
        ------
        DamagedStoreError
            The source's shard is not what its commit record says.
        """
        source = self.source
        name = source.shard_name(path, block)
        record = read_record(source, block)
        if record is None:
            raise StoreError(
                f"{source.place} lacks block {block} of split {source.name!r}; finish "
                "it first."
            )
        expected = tuple(record[list(source.arrays).index(path)].tolist())
        try:
            content = source.place.read(name)
        except FileNotFoundError:
            raise shard_damage(source.place, name, "is missing", block) from None
        found = shard_hash(content, source.hashing)
        if found != expected:
            what = "does not match its commit record"
            raise shard_damage(source.place, name, what, block)
        if not (self.link and _link(Path(source.place.label(name)), file)):
            write_atomically(file, content)
        return found if hashing == source.hashing else shard_hash(content, hashing)


def _link(source: Path, file: Path) -> bool:
    """Whether ``file`` could be made another name of ``source``."""
    temporary = file.with_name(f".{file.name}.linked.partial")
    with suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.link(source, temporary)
    except OSError:
        return False
    temporary.replace(file)
    # Renaming onto another name of the same file does nothing and leaves both.
    temporary.unlink(missing_ok=True)
    sync_folder(file.parent)
    return True
