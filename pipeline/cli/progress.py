"""What long commands tell while they work: a bar, a status file, an end on a signal."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click
from tqdm import tqdm

from pipeline.build.status import BuildStatus, status_file
from pipeline.parallel.ordered_map import Count
from pipeline.parallel.signals import Stopped, stop_on_signals

_MOMENT_S = 2.0
_GOES_ON = "repeat the command to continue"


def log_path(store: Path | str) -> Path:
    """Return the path of the log file of ``store``, which is in the same folder."""
    path = Path(store)
    return path.with_name(f"{path.name}.log")


@contextmanager
def build_progress(store: Path, label: str = "") -> Iterator[tuple["Bar", BuildStatus]]:
    """A bar, a status file beside the store, and an end of the process on a signal.

    ``label`` in the file's name tells processes at one store apart.
    """
    status = store.with_name(".".join(filter(None, (store.name, label, "status.json"))))
    progress = BuildStatus()
    with (
        end_on_signals(),
        status_file(status, progress),
        progress_bar(progress) as bar,
    ):
        yield bar, progress


@contextmanager
def end_on_signals(then: str = _GOES_ON) -> Iterator[None]:
    """End the process with one sentence at Ctrl-C or SIGTERM, exit code 130 or 143.

    ``then`` says what the same command does next. Also a decorator, for a whole command
    with what it imports.
    """
    try:
        with stop_on_signals():
            yield
    except Stopped as stopped:
        _end_process(f"Stopped by {stopped}; {then}.", stopped.exit_code)


def _end_process(text: str, exit_code: int) -> NoReturn:
    """End without waiting for threads that compute; blocks are whole or not there."""
    click.echo(text, err=True)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(exit_code)


@contextmanager
def check_bar(what: str, unit: str = "block") -> Iterator[Count]:
    """A bar of blocks that are being checked, where that takes more than a moment."""
    terminal = sys.stderr.isatty()
    with tqdm(
        unit=unit,
        desc=what,
        delay=_MOMENT_S,
        mininterval=_interval_s(),
        leave=not terminal,
    ) as bar:

        def count(done: int, total: int) -> None:
            if done == 0 and bar.n:
                # Another pass. A reset would show a bar that is not due yet, and that
                # then ends without a line break before the error that follows.
                bar.n = bar.last_print_n = 0
            bar.total = total
            bar.update(done - bar.n)

        yield count


def _interval_s() -> float:
    return 0.2 if sys.stderr.isatty() else 10.0


class Bar:
    """Samples read, samples whose blocks are written, blocks checked; a bar for each.

    With ``progress`` it knows what is there already.
    """

    def __init__(self, progress: BuildStatus | None = None) -> None:
        self._progress = progress
        self._what = ""
        self._bar: tqdm[Any] | None = None
        if progress is None:
            self._at("cache", "sample")

    def show_block(self, split: str, samples: int, blocks_left: int) -> None:
        """Tell of one more block, with ``samples``."""
        postfix, progress = f"{split}, {blocks_left} blocks left", self._progress
        if progress is None:
            bar = self._at("cache", "sample")
        else:
            # The rate is that from the first block on.
            bar = self._at("cache", "sample", progress.samples, progress.samples_done)
            samples = progress.samples_done - int(bar.n)
            postfix += f", {progress.workers} workers" if progress.workers > 1 else ""
            postfix += f", {len(progress.failed)} failed" if progress.failed else ""
        bar.set_postfix_str(postfix, refresh=False)
        bar.update(samples)

    def show_pass(self, done: int, total: int) -> None:
        """Tell how far a pass is: over samples to plan, over blocks to seal."""
        if done == 0:
            self._what = ""  # another pass
        planning = self._progress is not None and self._progress.state == "planning"
        bar = self._at(*(("plan", "sample") if planning else ("seal", "block")), total)
        bar.update(done - bar.n)

    def close(self) -> None:
        """Leave what it says where it is."""
        if self._bar is not None:
            self._bar.close()

    def _at(
        self, what: str, unit: str, total: int | None = None, done: int = 0
    ) -> "tqdm[Any]":
        if self._bar is None or self._what != what:
            self.close()
            self._what = what
            self._bar = tqdm(
                desc=what,
                unit=unit,
                total=total,
                initial=done,
                mininterval=_interval_s(),
            )
        return self._bar


@contextmanager
def progress_bar(progress: BuildStatus | None = None) -> Iterator[Bar]:
    """A bar on a terminal, a line every ten seconds elsewhere; with rate and ETA."""
    bar = Bar(progress)
    try:
        yield bar
    finally:
        bar.close()
