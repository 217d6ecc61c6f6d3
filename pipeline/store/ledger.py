"""Commit records of blocks and the digests of a sealed store's small files.

A record is the last thing written of a block; the digests the last but one of a store.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import DamagedStoreError
from pipeline.fields import Level
from pipeline.store.index import (
    DIGESTS,
    METADATA,
    SplitIndex,
    commit_key,
    damaged,
    split_files,
)
from pipeline.store.shard import with_crc, without_crc

Record = npt.NDArray[np.uint64]

_DIGEST_FILE = f"{DIGESTS}/c/0"
_HEX = 32


def shard_hash(shard: Any) -> tuple[int, int]:
    """BLAKE2b-128 of a shard file's bytes as two little-endian 64-bit words."""
    digest = hashlib.blake2b(shard, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def encode_record(hashes: Iterable[tuple[int, int]]) -> bytes:
    """Commit record's file for the shards of a block in the order of arrays."""
    return with_crc(np.array(list(hashes), "<u8").tobytes())


def read_record(split: SplitIndex, block: int) -> Record | None:
    """(n_arrays, 2) hashes of a block's shards; None where it is not committed."""
    try:
        stored = (split.store / split.name / commit_key(block)).read_bytes()
    except FileNotFoundError:
        return None
    raw = without_crc(stored)
    if raw is None or len(raw) != len(split.arrays) * 16:
        return None
    record = np.frombuffer(raw, "<u8").reshape(-1, 2)
    return record if record.any() else None


def missing_shards(split: SplitIndex, block: int) -> list[str]:
    """Arrays whose shard of ``block`` is absent or has not the planned size."""
    missing = []
    for path in split.arrays:
        file = split.shard_file(path, block)
        if not file.is_file() or file.stat().st_size != split.layout(path).n_bytes:
            missing.append(path)
    return missing


def mismatching_shards(split: SplitIndex, block: int, record: Record) -> list[str]:
    """Arrays whose shard of ``block`` has other bytes than its commit record says."""
    wrong = []
    for path, expected in zip(split.arrays, record.tolist(), strict=True):
        content = split.shard_file(path, block).read_bytes()
        if shard_hash(content) != tuple(expected):
            wrong.append(path)
    return wrong


def is_committed(split: SplitIndex, block: int, verify: bool = False) -> bool:
    """Whether a block is done: recorded, shards there and, if asked, of these bytes."""
    record = read_record(split, block)
    if record is None or missing_shards(split, block):
        return False
    return not (verify and mismatching_shards(split, block, record))


def protected_files(
    splits: Iterable[tuple[str, Mapping[str, Level], int, int]],
) -> list[str]:
    """Sorted names of the files that the digests cover: all but shards and themselves.

    ``splits`` gives name, level of every array, number of samples and of blocks.
    """
    files = {METADATA, f"{DIGESTS}/{METADATA}"}
    for split in splits:
        files |= split_files(*split)
    return sorted(files)


def digests_size(files: Iterable[str]) -> int:
    """Bytes that the digests of ``files`` take."""
    return sum(_HEX + 2 + len(name.encode()) for name in files)


def encode_digests(files: Iterable[str], content_of: Callable[[str], bytes]) -> bytes:
    """Chunk of array ``digests``: a line of hash and name for every file."""
    lines = [f"{_hash(content_of(name))} {name}\n" for name in files]
    return with_crc("".join(lines).encode())


def digests_file(store: Path) -> Path:
    """Place of the digests' only chunk."""
    return store / _DIGEST_FILE


def read_digests(store: Path) -> dict[str, str]:
    """Hash of every protected file of a sealed store by its name."""
    file = digests_file(store)
    raw = without_crc(file.read_bytes()) if file.is_file() else None
    if raw is None:
        raise damaged(file, "is missing or does not match its checksum")
    lines = raw.decode().splitlines()
    return {line[_HEX + 1 :]: line[:_HEX] for line in lines}


def changed_files(store: Path, digests: dict[str, str]) -> list[str]:
    """Names of the files that are gone or differ from their digest."""
    return [name for name, known in digests.items() if not _matches(store, name, known)]


def check_metadata(store: Path) -> None:
    """Raise unless metadata and index of a sealed store are as they were sealed.

    Commit records are left out: reading needs none, and there is one per block.
    """
    digests = {
        name: known
        for name, known in read_digests(store).items()
        if "/index/commit/c/" not in name
    }
    for name in changed_files(store, digests):
        raise damaged(store / name, "is not what was sealed")


def shard_damage(store: Path, file: Path, what: str, block: int) -> DamagedStoreError:
    """Error for a shard, which the teacher can make again."""
    return DamagedStoreError(
        f"{file} {what}; run `kd-cache verify {store} --repair`, then `kd-cache build "
        f"SPEC` writes block {block} again."
    )


def _matches(store: Path, name: str, known: str) -> bool:
    file = store / name
    return file.is_file() and _hash(file.read_bytes()) == known


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=_HEX // 2).hexdigest()
