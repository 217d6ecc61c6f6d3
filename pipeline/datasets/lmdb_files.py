"""LMDB files of a dataset, opened read-only once per process, and the keys in them."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import lmdb
import numpy as np
import numpy.typing as npt

from pipeline.datasets.folders import list_entries
from pipeline.datasets.paths import refuse_twins
from pipeline.errors import DataError

_open: WeakValueDictionary[str, lmdb.Environment] = WeakValueDictionary()
_lock = threading.Lock()

# Entries beside the samples: of OCP, of fairchem's ASE databases, of tensorpack.
METADATA = {b"length", b"metadata", b"num_samples", b"nextid", b"deleted_ids"}
METADATA |= {b"__len__", b"__keys__"}
LONGEST_NUMBER = 18
LAST = np.iinfo(np.int64).max


@dataclass(frozen=True)
class LmdbFile:
    """One LMDB, a file or a folder with data.mdb; picklable, open handles stay behind.

    Raises
    ------
    DataError
        It is no LMDB, or it is cut off.
    """

    path: Path

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    @property
    def data(self) -> Path:
        """The file that holds the data."""
        return self.path / "data.mdb" if self.path.is_dir() else self.path

    def get(self, key: str | bytes) -> bytes | None:
        """Bytes under ``key``, or None."""
        raw = key.encode() if isinstance(key, str) else key
        try:
            with self._environment.begin() as transaction:
                return transaction.get(raw)
        except (lmdb.Error, ValueError) as error:
            raise _unreadable(self.path, error) from None

    def codes(self) -> npt.NDArray[np.int64]:
        """Codes of the keys of all samples, (n,) int64; values stay unread.

        Numbers come first, in ascending order, then texts in the order of their bytes.
        A plain number is its own code. Any other key, such as ``007`` or ``a``, has a
        negative one. Keys in `METADATA` are left out.
        """
        numbers, others = self._scan()
        if not others:
            return numbers
        codes = np.append(numbers, -1 - np.arange(len(others), dtype=np.int64))
        values = np.append(numbers, [_value(key) for key in others])
        return codes[np.argsort(values, kind="stable")]

    def key(self, code: int) -> bytes:
        """Return the key that ``code`` stands for."""
        return str(code).encode() if code >= 0 else self._others[-1 - code]

    @cached_property
    def _others(self) -> list[bytes]:
        """Keys that are not plain numbers; a negative code is a place among them."""
        return self._scan()[1]

    def _scan(self) -> tuple[npt.NDArray[np.int64], list[bytes]]:
        numbers: list[int] = []
        others: list[bytes] = []
        try:
            with self._environment.begin() as transaction:
                for key in transaction.cursor().iternext(values=False):
                    if _is_plain_number(key):
                        numbers.append(int(key))
                    elif key not in METADATA:
                        others.append(key)
        except lmdb.Error as error:
            raise _unreadable(self.path, error) from None
        return np.sort(np.array(numbers, np.int64)), sorted(others)

    @cached_property
    def _environment(self) -> lmdb.Environment:
        place = str(self.path.resolve())
        # The same file twice in a process is an error to LMDB: splits share it.
        with _lock:
            environment = _open.get(place)
            if environment is None:
                environment = _open[place] = _open_environment(self.path)
        return environment


def key_text(key: bytes) -> str:
    """Return ``key`` as text; bytes that are no UTF-8 as escapes."""
    return key.decode(errors="backslashreplace")


def lmdb_files(paths: Sequence[Path], suffix: str) -> list[LmdbFile]:
    """The LMDBs at ``paths``, or those in the folders, in the order of their names.

    A folder without any may hold one folder that has them.

    Raises
    ------
    DataError
        There is none, or two of them seem to hold the same samples.
    """
    found = [file for path in paths for file in _find_lmdbs(path, suffix)]
    refuse_twins((file.path for file in found), (suffix,))
    return found


def _find_lmdbs(path: Path, suffix: str) -> list[LmdbFile]:
    if path.is_file() or (path / "data.mdb").is_file():
        return [LmdbFile(path)]
    found = list_entries(
        path,
        lambda entry: (
            (entry.is_file() and entry.suffix == suffix)
            or (entry / "data.mdb").is_file()
        ),
        f"{suffix} files and no LMDB folders",
    )
    return [LmdbFile(entry) for entry in found]


def _open_environment(path: Path) -> lmdb.Environment:
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
    needed = environment.stat()["psize"] * (environment.info()["last_pgno"] + 1)
    size = file.stat().st_size
    # Touching a page beyond the end of the file would kill the process. Pages at the
    # end that are free may be absent; telling these apart takes LMDB's own layout.
    if size < needed:
        environment.close()
        raise DataError(
            f"{path} is cut off: it has {size} bytes, but its header announces "
            f"{needed}; fetch it again, or if it is complete, write it anew with "
            "mdb_dump and mdb_load."
        )
    return environment


def _is_plain_number(key: bytes) -> bool:
    """Whether the key is a number as Python writes it and fits into int64."""
    plain = key.isdigit() and (key == b"0" or not key.startswith(b"0"))
    return plain and len(key) <= LONGEST_NUMBER


def _value(key: bytes) -> int:
    """The number that the key writes, or the largest one for a text."""
    return min(int(key), LAST) if key.isdigit() else LAST


def _unreadable(path: Path, error: Exception) -> DataError:
    # LMDB's message repeats the path.
    reason = str(error).removeprefix(f"{path}: ")
    return DataError(f"{path} cannot be read as LMDB ({reason}).")
