"""Commit records of blocks and the digests of a sealed store's small files.

A record is the last thing written of a block; the digests the last but one of a store.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.errors import DamagedStoreError
from pipeline.store.backends import StorageBackend
from pipeline.store.foreign import Alteration, find_alteration
from pipeline.store.index import DIGESTS, METADATA, XXH3, SplitFiles, SplitIndex
from pipeline.store.messages import name_blocks
from pipeline.store.metadata import damaged_file_error, read_checked
from pipeline.store.shard import with_crc, without_crc

log = logging.getLogger("pipeline.store")
Record = npt.NDArray[np.uint64]

DIGEST_FILE = f"{DIGESTS}/c/0"
_HEX = 32


def shard_hash(shard: Any, algorithm: str) -> tuple[int, int]:
    """128-bit hash of a shard file's bytes as two little-endian 64-bit words."""
    if algorithm == XXH3:
        digest = xxhash.xxh3_128_digest(shard)
    else:
        digest = hashlib.blake2b(shard, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def encode_record(hashes: Iterable[tuple[int, int]]) -> bytes:
    """Commit record's file for the shards of a block in the order of arrays."""
    return with_crc(np.array(list(hashes), "<u8").tobytes())


def read_record(split: SplitIndex, block: int) -> Record | None:
    """(n_arrays, 2) hashes of a block's shards; None where it is not committed."""
    try:
        stored = split.place.read(split.record_name(block))
    except FileNotFoundError:
        return None
    raw = without_crc(stored)
    if raw is None or len(raw) != len(split.arrays) * 16:
        return None
    record = np.frombuffer(raw, "<u8").reshape(-1, 2)
    return record if record.any() else None


def find_missing_shards(split: SplitIndex, block: int) -> list[str]:
    """Arrays whose shard of ``block`` is absent or cannot have its size."""
    missing = []
    for path in split.arrays:
        size = split.place.size(split.shard_name(path, block))
        if size is None or split.layout(path).size_fault(size):
            missing.append(path)
    return missing


def find_mismatching_shards(split: SplitIndex, block: int, record: Record) -> list[str]:
    """Arrays whose shard of ``block`` has other bytes than its commit record says."""
    wrong = []
    for path, expected in zip(split.arrays, record.tolist(), strict=True):
        name = split.shard_name(path, block)
        place = split.place
        content = place.map(name) if place.mappable else place.read(name)
        if shard_hash(content, split.hashing) != tuple(expected):
            wrong.append(path)
    return wrong


def is_committed(split: SplitIndex, block: int, verify: bool = False) -> bool:
    """Whether a block is done: recorded, shards there and, if asked, of these bytes."""
    record = read_record(split, block)
    if record is None or find_missing_shards(split, block):
        return False
    return not (verify and find_mismatching_shards(split, block, record))


def unsealed_message(place: StorageBackend, splits: Iterable[SplitIndex]) -> str:
    """Sentence that names the missing blocks of every split and the way on."""
    missing = []
    for split in splits:
        blocks = [b for b in range(split.n_blocks) if not is_committed(split, b)]
        if blocks:
            missing.append(f"{name_blocks(blocks)} of split {split.name!r}")
    what = "lacks " + " and ".join(missing) if missing else "is complete but not sealed"
    return f"{place} {what}; continue it with `kd-cache build SPEC`."


def list_protected_files(splits: Iterable[SplitFiles]) -> list[str]:
    """Sorted names of the files that the digests cover: all but shards and theirs."""
    files = {METADATA, f"{DIGESTS}/{METADATA}"}
    for split in splits:
        files |= split.names()
    return sorted(files)


def digests_size(files: Iterable[str]) -> int:
    """Bytes that the digests of ``files`` take."""
    return sum(_HEX + 2 + len(name.encode()) for name in files)


def encode_digests(files: Iterable[str], content_of: Callable[[str], bytes]) -> bytes:
    """Chunk of array ``digests``: a line of hash and name for every file."""
    lines = [f"{_hash(content_of(name))} {name}\n" for name in files]
    return with_crc("".join(lines).encode())


def read_digests(place: StorageBackend) -> dict[str, str]:
    """Hash of every protected file of a sealed store by its name."""
    lines = read_checked(place, DIGEST_FILE).decode().splitlines()
    return {line[_HEX + 1 :]: line[:_HEX] for line in lines}


def find_changed_files(
    place: StorageBackend, digests: dict[str, str], contents: Mapping[str, bytes]
) -> dict[str, Alteration | None]:
    """Files that are gone or differ from their digest, by name.

    Each with what another program did to it, None where that is damage. Where files
    cannot be mapped, their ``contents`` have been read before.
    """
    return {
        name: _alteration(place, name, known, contents)
        for name, known in digests.items()
        if not _matches(place, name, known, contents)
    }


def _alteration(
    place: StorageBackend, name: str, known: str, contents: Mapping[str, bytes]
) -> Alteration | None:
    if not name.endswith(METADATA):
        return None
    try:
        content = place.read(name) if place.mappable else contents[name]
    except (FileNotFoundError, KeyError):
        return None
    return find_alteration(content, lambda candidate: _hash(candidate) == known)


def check_metadata(place: StorageBackend) -> dict[str, bytes]:
    """Check metadata and index of a sealed store; what was read for that, by name.

    Mapped files are not kept: the index of millions of samples would be there twice.
    Commit records are left out: reading needs none, and there is one per block.

    Raises
    ------
    DamagedStoreError
        A file is missing or differs from its digest; names the first.
    """
    digests = {
        name: known
        for name, known in read_digests(place).items()
        if "/index/commit/c/" not in name
    }
    contents = place.fetch(list(digests))
    for name, altered in find_changed_files(place, digests, contents).items():
        if altered is None:
            raise damaged_file_error(place, name, "is not what was sealed")
        if altered.cleaned is not None:
            log.warning(
                "%s %s, which changes nothing that is read here; `kd-cache verify %s "
                "--repair` removes it",
                place.label(name),
                altered.what,
                place,
            )
    return contents


def shard_damage(
    place: StorageBackend, name: str, what: str, block: int
) -> DamagedStoreError:
    """Error for a shard, which the teacher can make again."""
    return DamagedStoreError(
        f"{place.label(name)} {what}; run `kd-cache verify {place} --repair`, then "
        f"`kd-cache build SPEC` writes block {block} again."
    )


def _matches(
    place: StorageBackend, name: str, known: str, contents: Mapping[str, bytes]
) -> bool:
    if not place.mappable:
        return name in contents and _hash(contents[name]) == known
    try:
        return _hash(place.map(name)) == known
    except FileNotFoundError:
        return False


def _hash(content: Any) -> str:
    return hashlib.blake2b(content, digest_size=_HEX // 2).hexdigest()
