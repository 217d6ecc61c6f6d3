"""Wall and processor time of writing and reading; eviction from the page cache."""

import ctypes
import mmap
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from stores.data import Indices

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True)
class Cost:
    """Seconds on the wall and of the processor, kernel included, for ``samples``."""

    wall: float
    cpu: float
    samples: int
    n_bytes: int

    @property
    def rate(self) -> float:
        """Samples a second."""
        return self.samples / self.wall


class Stopwatch:
    """Adds up wall and processor time of this process while it runs."""

    def __init__(self) -> None:
        self.wall = 0.0
        self.cpu = 0.0
        self.resume()

    def resume(self) -> None:
        """Go on."""
        self._wall, self._cpu = time.perf_counter(), cpu_seconds()

    def pause(self) -> None:
        """Stop for a while."""
        self.wall += time.perf_counter() - self._wall
        self.cpu += cpu_seconds() - self._cpu

    def outside(self, items: Iterable[T]) -> Iterator[T]:
        """The same items, made while the watch stands still."""
        iterator = iter(items)
        while True:
            self.pause()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.resume()
            yield item


def cpu_seconds() -> float:
    """Processor time of all threads of this process, in user and kernel mode."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def time_reads(
    read: Callable[[Indices], Any],
    batches: Sequence[Indices],
    bytes_of: Callable[[Indices], int],
    threads: int = 1,
) -> Cost:
    """Cost of reading ``batches``, dealt out to ``threads`` threads as they finish."""
    n_bytes = sum(bytes_of(batch) for batch in batches)
    watch = Stopwatch()
    if threads == 1:
        for batch in batches:
            read(batch)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(lambda batch: read(batch) and None, batches):
                pass
    watch.pause()
    return Cost(watch.wall, watch.cpu, sum(map(len, batches)), n_bytes)


def files_of(path: Path) -> list[Path]:
    """Every file at or below ``path``."""
    return [file for file in path.rglob("*") if file.is_file()]


def evict(folder: Path) -> None:
    """Take all files of ``folder`` out of the page cache, mapped ones included.

    A mapped page cannot be evicted, so this process first drops its page tables.
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        if f"{folder}/" in line:
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            _libc.madvise(begin, end - begin, mmap.MADV_DONTNEED)
    for file in files_of(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def warm_up(folder: Path) -> None:
    """Read all files of ``folder`` once, so that they are in the page cache."""
    for file in files_of(folder):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass
