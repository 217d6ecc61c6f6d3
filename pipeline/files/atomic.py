"""Atomic writes and content hashes of files; knows nothing of what is in them."""

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.errors import BusyError, StoreError


def is_full(error: OSError) -> bool:
    """Whether the disk or the quota has no room left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def disk_full_as_error(store: Path) -> Iterator[None]:
    """Name ``store`` and the way on where its disk has no room for what is written.

    The error of the system names no file, or a working file that is gone by then.

    Raises
    ------
    StoreError
        The disk or the quota is full.
    """
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise StoreError(
            f"There is no space left on the disk of {store} ({error.strerror}); "
            "free some space and repeat the command to continue."
        ) from error


def is_free(path: Path) -> bool:
    """Whether something may be made at ``path``: nothing or an empty folder is there.

    A folder that was made ahead, by a scheduler or by hand, is to be used.
    """
    if path.is_dir():
        return next(path.iterdir(), None) is None
    return not path.exists()


# Folders that this process holds.
_HELD: set[Path] = set()


def is_held(folder: Path) -> bool:
    """Whether this process holds ``folder``."""
    return folder.resolve() in _HELD


@contextmanager
def hold_lock(folder: Path) -> Iterator[None]:
    """Keep ``folder`` to this process, made if missing and removed if left empty.

    The lock is one of the system: it ends with the process, however that ends.

    Raises
    ------
    BusyError
        Another process holds the folder.
    """
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(
            f"{folder} is in use by another process; wait for it to end or choose "
            "another --out."
        ) from None
    _HELD.add(folder.resolve())
    try:
        yield
    finally:
        _HELD.discard(folder.resolve())
        # Removed while held: whoever waits sees that it is gone and makes its own.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        for made in missing:
            with suppress(OSError):
                made.rmdir()


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replace ``path`` with ``content`` so that a kill leaves the old or the new file.

    The bytes are durable on return: the file and its folder are both synced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=".partial"
    )
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and new entries of ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder_durably(folder: Path, root: Path) -> None:
    """Create ``folder`` below ``root`` with all that is missing on the way to it."""
    missing = []
    parent = folder
    while parent != root and not parent.exists():
        missing.append(parent)
        parent = parent.parent
    folder.mkdir(parents=True, exist_ok=True)
    for created in missing:
        sync_folder(created.parent)
