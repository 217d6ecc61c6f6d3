"""LMDB files of a dataset, opened read-only once per process; what is lost if cut."""

import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakValueDictionary

import lmdb

from pipeline.datasets.paths import refuse_twins
from pipeline.errors import DataError

_open: WeakValueDictionary[str, lmdb.Environment] = WeakValueDictionary()
_lock = threading.Lock()

_NODE = struct.Struct("<HHHH")
_PAGE_HEADER = 16
_IS_BRANCH, _IS_LEAF, _IS_ELSEWHERE = 1, 2, 1


@dataclass(frozen=True)
class LmdbFile:
    """One LMDB, a file or a folder with data.mdb; picklable, open handles stay behind.

    Raises
    ------
    DataError
        It is no LMDB, or it is cut off; the latter names the first sample lost.
    """

    path: Path

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    @property
    def data(self) -> Path:
        """The file that holds the data."""
        return self.path / "data.mdb" if self.path.is_dir() else self.path

    def get(self, key: str) -> bytes | None:
        """Bytes under ``key``, or None."""
        try:
            with self._environment.begin() as transaction:
                return transaction.get(key.encode())
        except lmdb.Error as error:
            raise _unreadable(self.path, error) from None

    def numeric_keys(self) -> list[int]:
        """All keys that are non-negative integers, ascending; values stay unread."""
        try:
            with self._environment.begin() as transaction:
                keys = transaction.cursor().iternext(values=False)
                return sorted(int(key) for key in keys if key.isdigit())
        except lmdb.Error as error:
            raise _unreadable(self.path, error) from None

    @cached_property
    def _environment(self) -> lmdb.Environment:
        place = str(self.path.resolve())
        # The same file twice in a process is an error to LMDB: splits share it.
        with _lock:
            environment = _open.get(place)
            if environment is None:
                environment = _open[place] = _opened(self.path)
        return environment


def lmdb_files(paths: Sequence[Path], suffix: str) -> list[LmdbFile]:
    """The LMDBs at ``paths``, or those in the folders, in the order of their names.

    Raises
    ------
    DataError
        There is none, or one twice.
    """
    found = [file for path in paths for file in _lmdbs_at(path, suffix)]
    refuse_twins(file.path for file in found)
    return found


def _lmdbs_at(path: Path, suffix: str) -> list[LmdbFile]:
    if path.is_file() or (path / "data.mdb").is_file():
        return [LmdbFile(path)]
    if not path.is_dir():
        raise DataError(f"{path} does not exist.")
    found = [
        LmdbFile(entry)
        for entry in sorted(path.iterdir())
        if (entry.is_file() and entry.suffix == suffix)
        or (entry / "data.mdb").is_file()
    ]
    if not found:
        raise DataError(f"{path} holds no {suffix} files and no LMDB folders.")
    return found


def _opened(path: Path) -> lmdb.Environment:
    folder = path.is_dir()
    try:
        environment = lmdb.open(
            str(path),
            subdir=folder,
            readonly=True,
            lock=False,
            readahead=False,
            meminit=False,
            create=False,
        )
    except lmdb.Error as error:
        raise _unreadable(path, error) from None
    file = path / "data.mdb" if folder else path
    page, pages = environment.stat()["psize"], environment.info()["last_pgno"] + 1
    # Touching a page beyond the end of the file would kill the process. Pages at the
    # end may be free ones that were never written; then nothing is lost.
    if file.stat().st_size < page * pages:
        try:
            _check_pages(path, file, page)
        except DataError:
            environment.close()
            raise
    return environment


def _check_pages(path: Path, file: Path, page: int) -> None:
    cut = f"{path} is cut off at {file.stat().st_size} bytes"
    try:
        with file.open("rb") as stream:
            lost = sorted(_lost_keys(stream, page), key=lambda key: (len(key), key))
    except (EOFError, struct.error):
        raise DataError(
            f"{cut} and has lost its index: every sample from '0' on; fetch it again."
        ) from None
    if lost:
        raise DataError(
            f"{cut} and has lost {len(lost)} samples, the first is "
            f"{lost[0].decode(errors='replace')!r}; fetch it again."
        )


def _lost_keys(stream: BinaryIO, page: int) -> Iterator[bytes]:
    """Keys whose values lie beyond the end of the file.

    Raises
    ------
    EOFError
        A page of the index itself lies there.
    """
    size = stream.seek(0, 2)
    metas = [_read_page(stream, number, page) for number in (0, 1)]
    # Offsets in LMDB's meta page: root of the main tree, last transaction.
    root, transaction = 128, 144
    newest = max(metas, key=lambda meta: struct.unpack_from("<Q", meta, transaction))
    pending = [struct.unpack_from("<Q", newest, root)[0]]
    while pending:
        content = _read_page(stream, pending.pop(), page)
        (flags,) = struct.unpack_from("<H", content, 10)
        for low, high, kind, key, data in _nodes(content):
            if flags & _IS_BRANCH:
                pending.append(low | high << 16 | kind << 32)
            elif flags & _IS_LEAF and kind & _IS_ELSEWHERE:
                (first,) = struct.unpack_from("<Q", content, data)
                length = _PAGE_HEADER + (low | high << 16)
                if first * page + length > size:
                    yield key


def _read_page(stream: BinaryIO, number: int, page: int) -> bytes:
    stream.seek(number * page)
    content = stream.read(page)
    if len(content) < page:
        raise EOFError
    return content


def _nodes(content: bytes) -> Iterator[tuple[int, int, int, bytes, int]]:
    """(size or page in two halves, flags, key, offset of data) of a page's entries."""
    (lower,) = struct.unpack_from("<H", content, 12)
    for place in range(_PAGE_HEADER, lower, 2):
        (node,) = struct.unpack_from("<H", content, place)
        low, high, flags, length = _NODE.unpack_from(content, node)
        data = node + _NODE.size + length
        yield low, high, flags, content[node + _NODE.size : data], data


def _unreadable(path: Path, error: lmdb.Error) -> DataError:
    # LMDB's message repeats the path.
    reason = str(error).removeprefix(f"{path}: ")
    return DataError(f"{path} cannot be read as LMDB ({reason}).")
