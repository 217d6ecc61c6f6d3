"""What a store has to offer to be compared."""

from pathlib import Path
from typing import Protocol

from stores.data import Arrays, Indices, Samples
from stores.timing import Stopwatch


class Reader(Protocol):
    """A store opened for reading, by several threads at once."""

    def read(self, batch: Indices) -> Arrays:
        """Fresh arrays of the samples ``batch``, numbers of the dataset's order."""

    def close(self) -> None:
        """Let go of files and maps."""


class Writer(Protocol):
    """A way to write samples; what it leaves is in the folder ``files``."""

    name: str
    files: str

    def write(self, folder: Path, samples: Samples, watch: Stopwatch) -> None:
        """Write all samples durably; making the samples is not on the watch."""


class Case(Writer, Protocol):
    """A way to write and read samples.

    Cases of equal ``files`` read the same files, which the first of them writes.
    ``slow`` marks what needs so long for a batch that a few have to do.
    """

    slow: bool

    def open(self, folder: Path, samples: Samples) -> Reader:
        """Reader of what was written there."""
