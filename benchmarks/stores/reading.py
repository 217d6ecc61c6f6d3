"""Rounds of shuffled reads of all stores, side by side."""

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from stores.case import Case, Reader
from stores.data import Arrays, Indices, Samples, shuffled_batches
from stores.ours import OurReader
from stores.table import LEGEND, cost_cells, print_table
from stores.timing import Cost, evict, time_reads, warm_up

BATCH = 32
SLOW_BATCHES = 4
# Squared error of q8 relative to the squares; noise has no outliers.
MOST_ERROR = 2e-4
Costs = dict[str, list[Cost]]
Phases = dict[str, Costs]


def check_identical(cases: Sequence[Case], folder: Path, samples: Samples) -> int:
    """Compare every store's bytes with the samples; returns how many batches.

    Lossy profiles of ours are decoded and compared up to their error.
    """
    batches = shuffled_batches(len(samples), BATCH, 50, seed=99)
    for case in cases:
        with closing(case.open(folder / case.files, samples)) as reader:
            for batch in batches[:SLOW_BATCHES] if case.slow else batches:
                expected = samples.take(batch)
                if isinstance(reader, OurReader) and not reader.exact:
                    _check_near(reader.decoded(batch), expected)
                    continue
                found = reader.read(batch)
                for path, rows in expected.items():
                    np.testing.assert_array_equal(found[path], rows, strict=True)
    return len(batches)


def _check_near(found: Arrays, expected: Arrays) -> None:
    for path, rows in expected.items():
        exact = rows.astype(np.float64)
        error = np.square(found[path] - exact).sum() / np.square(exact).sum()
        assert error < MOST_ERROR, (path, error)


class Rounds:
    """Reads every store in turn, round by round, each with new permutations."""

    def __init__(self, folder: Path, samples: Samples, limit: int) -> None:
        self._folder = folder
        self._samples = samples
        self._limit = limit
        self._seed = 0
        self.phases: Phases = {}

    def warm(self, case: Case) -> None:
        """First and later epochs with everything in the page cache."""
        with closing(self._open(case)) as reader:
            self._read("warm, first epoch", case, reader, 1)
            self._finish_epoch(case, reader)
            self._read("warm, later epochs", case, reader, 1)
            self._read("warm, later epochs, 2 threads", case, reader, 2)

    def evicted(self, case: Case) -> None:
        """First and later epochs, before each of which the page cache is emptied."""
        forget = partial(evict, self._folder / case.files)
        for threads in (1, 2):
            end = "" if threads == 1 else ", 2 threads"
            with closing(self._open(case)) as reader:
                forget()
                self._read(f"evicted, first epoch{end}", case, reader, threads)
                self._finish_epoch(case, reader)
                forget()
                self._read(f"evicted, later epochs{end}", case, reader, threads)

    def _finish_epoch(self, case: Case, reader: Reader) -> None:
        """Read everything once where the timed batches were a part of it only."""
        n = len(self._samples)
        if self._limit < n // BATCH and not case.slow:
            for batch in np.array_split(np.arange(n), max(n // 512, 1)):
                reader.read(batch)

    def _open(self, case: Case) -> Reader:
        return case.open(self._folder / case.files, self._samples)

    def _read(self, phase: str, case: Case, reader: Reader, threads: int) -> None:
        self._seed += 1
        limit = SLOW_BATCHES if case.slow else self._limit
        batches: list[Indices] = shuffled_batches(
            len(self._samples), BATCH, limit, self._seed
        )
        cost = time_reads(reader.read, batches, self._samples.bytes_of, threads)
        self.phases.setdefault(phase, {}).setdefault(case.name, []).append(cost)


def warm_rounds(
    cases: Sequence[Case],
    rounds: Rounds,
    folder: Path,
    count: int,
    after_round: Callable[[Rounds], None] = lambda _: None,
) -> None:
    """Warm rounds; ``after_round`` may add another store's costs to each."""
    for case in cases:
        warm_up(folder / case.files)
    for _ in range(count):
        for case in cases:
            rounds.warm(case)
        after_round(rounds)


def evicted_rounds(cases: Sequence[Case], rounds: Rounds, count: int) -> None:
    """Rounds with an empty page cache."""
    for _ in range(count):
        for case in cases:
            rounds.evicted(case)


def print_phases(phases: Phases, base: str) -> None:
    """A table for every phase, ratios to the store named ``base``; forgets them."""
    for number, (phase, costs) in enumerate(phases.items()):
        rows = [[name, *cost_cells(c, costs[base])] for name, c in costs.items()]
        head = ["store", "samples/s", "MB/s", "CPU s", "x base"]
        print_table(phase, head, rows, LEGEND if number == 0 else "")
    phases.clear()
