"""How far a build is: counted in one place, told by a file beside the store."""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from pipeline.parallel.signals import Stopped

State = Literal["planning", "filling", "sealing", "done", "failed", "interrupted"]
INTERVAL_S = 2.0


@dataclass
class BuildStatus:
    """Counts of one run of a build; samples and blocks include those found done.

    While it plans, samples are those that the pass at hand has read.

    ``failed`` has the reason of every block that could not be made.
    """

    state: State = "planning"
    blocks: int = 0
    blocks_done: int = 0
    blocks_checked: int = 0
    samples: int = 0
    samples_done: int = 0
    workers: int = 0
    retries: int = 0
    smaller_passes: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    _began: float | None = None
    _first: tuple[float, int] | None = None
    _last: float = 0.0
    samples_before: int = 0

    def begin(self, blocks: int, samples: int, done: int, samples_done: int) -> None:
        """Start to fill ``blocks`` of ``samples``, of which some are done."""
        self.blocks, self.blocks_done = blocks, done
        self.samples, self.samples_done = samples, samples_done
        self.samples_before = samples_done
        self._began = time.monotonic()
        self.state = "filling"

    def add(self, samples: int) -> None:
        """Count one more block with ``samples``."""
        self.blocks_done += 1
        self.samples_done += samples
        self._last = time.monotonic()
        if self._first is None:
            self._first = self._last, self.samples_done

    def count(self, done: int, total: int) -> None:
        """Tell how far a pass is: over samples to plan, over all blocks to seal."""
        if self.state == "planning":
            self.samples_done, self.samples = done, total
        else:
            self.blocks = self.blocks_done = total
            self.blocks_checked = done

    @property
    def rate(self) -> float | None:
        """Samples per second; None before the first block.

        Between the first block and the last one, so that what workers need to start is
        left out as soon as there are two blocks.
        """
        if self._began is None or self._first is None:
            return None
        begin, before = self._first
        if self.samples_done == before:
            begin, before = self._began, self.samples_before
        return (self.samples_done - before) / max(self._last - begin, 1e-9)

    @property
    def eta(self) -> float | None:
        """Seconds until the last block at the rate so far."""
        rate = self.rate
        return None if rate is None else (self.samples - self.samples_done) / rate

    def to_dict(self) -> dict[str, Any]:
        """Everything, under the names of the status file."""
        return {
            "state": self.state,
            "blocks_done": self.blocks_done,
            "blocks_total": self.blocks,
            "blocks_checked": self.blocks_checked,
            "samples_done": self.samples_done,
            "samples_total": self.samples,
            "samples_per_second": _round(self.rate),
            "eta_seconds": _round(self.eta if self.state == "filling" else None),
            "workers_alive": self.workers,
            "retries": self.retries,
            "smaller_passes": self.smaller_passes,
            "failed_blocks": dict(self.failed),
            "error": self.error,
        }


@contextmanager
def status_file(path: Path, progress: BuildStatus) -> Iterator[None]:
    """Keep ``progress`` in a JSON file at ``path``, written anew every two seconds.

    It is replaced at once and always whole. At the end its state is done, interrupted
    or failed. Where another process writes that file already, this one leaves it alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        # Another process writes it, or there is no room for a lock: nothing depends
        # on this file, and a full disk ends the build elsewhere.
        yield
        return
    writer = _StatusWriter(path, progress)
    try:
        with _record_ending(progress):
            yield
    finally:
        writer.end()
        # Removed while held: whoever waits sees that it is gone and makes its own.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def _record_ending(progress: BuildStatus) -> Iterator[None]:
    try:
        yield
    except (Stopped, KeyboardInterrupt):
        progress.state = "interrupted"
        raise
    except BaseException as error:
        progress.state = "failed"
        progress.error = str(error) or type(error).__name__
        raise
    progress.state = "done"


class _StatusWriter:
    """A thread that writes the file again and again, until it is told to end."""

    def __init__(self, path: Path, progress: BuildStatus) -> None:
        self._path = path
        self._progress = progress
        self._started = _now()
        self._over = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._repeat, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Write the last state."""
        self._over.set()
        self._thread.join()
        self._write()

    def _repeat(self) -> None:
        while not self._over.wait(INTERVAL_S):
            self._write()

    def _write(self) -> None:
        document = {
            **self._progress.to_dict(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": self._started,
            "updated": _now(),
        }
        # Not ".partial", which creating a store clears away as its own.
        temporary = self._path.with_name(f".{self._path.name}.new")
        with suppress(OSError):
            temporary.write_text(json.dumps(document, indent=2) + "\n")
            temporary.replace(self._path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
