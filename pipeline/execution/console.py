"""What long commands tell while they work: a bar, a status file, an end on a signal."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import click
from tqdm import tqdm

from pipeline.execution.interrupts import Stopped, stopped_by_signals
from pipeline.execution.passes import Count
from pipeline.execution.progress import Progress, status_file

Report = Callable[[str, int, int], None]
_MOMENT_S = 2.0


@contextmanager
def told(store: Path, label: str = "") -> Iterator[tuple[Report, Progress]]:
    """A bar, a status file beside the store, and an end of the process on a signal.

    ``label`` in the file's name tells processes at one store apart.
    """
    status = store.with_name(".".join(filter(None, (store.name, label, "status.json"))))
    progress = Progress()
    try:
        with (
            stopped_by_signals(),
            status_file(status, progress),
            progress_bar(progress) as report,
        ):
            yield report, progress
    except Stopped as stopped:
        text = f"Stopped by {stopped}; the same command goes on where it stopped."
        _end_process(text, stopped.exit_code)


def _end_process(text: str, exit_code: int) -> NoReturn:
    """End without waiting for threads that compute; blocks are whole or not there."""
    click.echo(text, err=True)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(exit_code)


@contextmanager
def check_bar(what: str) -> Iterator[Count]:
    """A bar of blocks that are being checked, where that takes more than a moment."""
    terminal = sys.stderr.isatty()
    with tqdm(
        unit="block",
        desc=what,
        delay=_MOMENT_S,
        mininterval=_interval_s(),
        leave=not terminal,
    ) as bar:

        def count(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield count


def _interval_s() -> float:
    return 0.2 if sys.stderr.isatty() else 10.0


@contextmanager
def progress_bar(
    progress: Progress | None = None,
) -> Iterator[Report]:
    """A bar on a terminal, a line every ten seconds elsewhere; with rate and ETA."""
    with tqdm(unit="sample", desc="cache", mininterval=_interval_s()) as bar:

        def report(split: str, samples: int, blocks_left: int) -> None:
            told = f"{split}, {blocks_left} blocks left"
            if progress is not None:
                if bar.total is None:
                    bar.reset(progress.samples)
                    bar.initial = bar.n = bar.last_print_n = progress.samples_before
                told += f", {progress.workers} workers" if progress.workers > 1 else ""
                told += f", {len(progress.failed)} failed" if progress.failed else ""
            bar.set_postfix_str(told, refresh=False)
            bar.update(samples)

        yield report
