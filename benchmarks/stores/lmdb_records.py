"""LMDB with one record a sample: the arrays' bytes one behind the other."""

from pathlib import Path

import lmdb
import numpy as np

from stores.data import Arrays, Column, Indices, Samples
from stores.timing import Stopwatch

PART = 256
MAP_SIZE = 1 << 40


class Lmdb:
    """A database in one file; ``readahead`` is a matter of reading alone."""

    files = "lmdb"
    slow = False

    def __init__(self, name: str, readahead: bool) -> None:
        self.name = name
        self._readahead = readahead

    def write(self, folder: Path, samples: Samples, watch: Stopwatch) -> None:
        """A transaction for every part, one sync at the end."""
        path = str(folder / "data.lmdb")
        with lmdb.open(
            path, subdir=False, map_size=MAP_SIZE, sync=False, lock=False
        ) as environment:
            for indices, part in watch.outside(samples.parts(PART)):
                ends = np.cumsum(samples.n_atoms[indices])
                with environment.begin(write=True) as transaction:
                    for number, index in enumerate(indices.tolist()):
                        end = int(ends[number])
                        atoms = slice(end - int(samples.n_atoms[index]), end)
                        row = slice(number, number + 1)
                        pieces = [
                            part[c.path][atoms if c.per_atom else row].tobytes()
                            for c in ordered(samples.columns)
                        ]
                        transaction.put(key_of(index), b"".join(pieces), append=True)
            environment.sync(True)

    def open(self, folder: Path, samples: Samples) -> "LmdbReader":
        """Environment without locks, as a finished dataset is read."""
        environment = lmdb.open(
            str(folder / "data.lmdb"),
            subdir=False,
            readonly=True,
            lock=False,
            readahead=self._readahead,
        )
        return LmdbReader(environment, samples)


class LmdbReader:
    """Views of the records, joined with numpy."""

    def __init__(self, environment: lmdb.Environment, samples: Samples) -> None:
        self._environment = environment
        self._n_atoms = samples.n_atoms
        self._columns = ordered(samples.columns)

    def read(self, batch: Indices) -> Arrays:
        """See `Reader`; arrays come in the order of the record."""
        with self._environment.begin(buffers=True) as transaction:
            records = [transaction.get(key_of(index)) for index in batch.tolist()]
            offsets = np.zeros(len(batch), np.int64)
            read: Arrays = {}
            for column in self._columns:
                rows = self._n_atoms[batch] if column.per_atom else np.ones_like(batch)
                length = rows * column.row_bytes
                pieces = [
                    np.frombuffer(record, np.uint8, size, offset)
                    for record, size, offset in zip(
                        records, length.tolist(), offsets.tolist(), strict=True
                    )
                ]
                joined = np.concatenate(pieces).view(column.dtype)
                read[column.path] = joined.reshape(-1, *column.shape)
                offsets += length
        return read

    def close(self) -> None:
        """Unmap the database."""
        self._environment.close()


def key_of(index: int) -> bytes:
    """Key that sorts like the number."""
    return index.to_bytes(8, "big")


def ordered(columns: tuple[Column, ...]) -> list[Column]:
    """Columns with the widest items first, so that all of them are aligned."""
    return sorted(columns, key=lambda column: -np.dtype(column.dtype).itemsize)
