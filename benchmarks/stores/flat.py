"""A flat file an array, mapped by numpy: the yardstick of every ratio."""

import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from stores.data import Arrays, Indices, Samples
from stores.timing import Stopwatch

PART = 256


class FlatFile:
    """All bytes into one file, then one fsync: the least that writing can cost."""

    name = "one flat file"
    files = "flat"

    def write(self, folder: Path, samples: Samples, watch: Stopwatch) -> None:
        """Write it; it cannot be read back by sample."""
        with (folder / "all.bin").open("wb", buffering=0) as stream:
            for _, part in watch.outside(samples.parts(PART)):
                for rows in part.values():
                    stream.write(rows.reshape(-1).view(np.uint8).data)
            os.fsync(stream.fileno())


class Memmap:
    """A file an array, rows in the dataset's order.

    ``plain`` slices bare arrays over the maps, for slicing ``np.memmap`` itself costs
    a microsecond or two a slice.
    """

    files = "memmap"
    slow = False

    def __init__(self, name: str, plain: bool) -> None:
        self.name = name
        self._plain = plain

    def write(self, folder: Path, samples: Samples, watch: Stopwatch) -> None:
        """Append part by part, sync every file once."""
        with ExitStack() as stack:
            streams = {
                column.path: stack.enter_context(
                    flat_file(folder, column.path).open("wb", buffering=0)
                )
                for column in samples.columns
            }
            for _, part in watch.outside(samples.parts(PART)):
                for path, rows in part.items():
                    streams[path].write(rows.reshape(-1).view(np.uint8).data)
            for stream in streams.values():
                os.fsync(stream.fileno())

    def open(self, folder: Path, samples: Samples) -> "MemmapReader":
        """Mapped files."""
        return MemmapReader(folder, samples, self._plain)


class MemmapReader:
    """Slices of the maps, joined with numpy."""

    def __init__(self, folder: Path, samples: Samples, plain: bool) -> None:
        self._columns = samples.columns
        ends = np.cumsum(samples.n_atoms)
        self._bounds = {
            True: (ends - samples.n_atoms, ends),
            False: (np.arange(len(samples)), np.arange(1, len(samples) + 1)),
        }
        maps = {
            column.path: np.memmap(
                flat_file(folder, column.path), column.dtype, "r"
            ).reshape(-1, *column.shape)
            for column in samples.columns
        }
        self._maps: Arrays = dict(maps)
        if plain:
            self._maps = {path: np.asarray(rows) for path, rows in maps.items()}

    def read(self, batch: Indices) -> Arrays:
        """See `Reader`."""
        read: Arrays = {}
        for column in self._columns:
            first, end = self._bounds[column.per_atom]
            rows = self._maps[column.path]
            ranges = zip(first[batch].tolist(), end[batch].tolist(), strict=True)
            read[column.path] = np.concatenate([rows[i:j] for i, j in ranges])
        return read

    def close(self) -> None:
        """Unmap the files."""
        self._maps.clear()


def flat_file(folder: Path, path: str) -> Path:
    """File of the array ``path``."""
    return folder / f"{path.replace('/', '.')}.bin"
