"""Where warnings go: standard error and a log file, once each, from any process."""

import logging
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

# All loggers of this program are below these.
LOGGERS = ("pipeline", "kd_train")
_LINE = "%(asctime)s %(levelname)s %(message)s"


class LoggedWarning(NamedTuple):
    """A warning of another process: which logger it came from, and its text."""

    logger: str
    text: str


class _Once(logging.Filter):
    """Lets a warning pass the first time; workers may all have the same to tell."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        text = record.getMessage()
        known = text in self._seen
        self._seen.add(text)
        return not known


class _Console(logging.Handler):
    """Standard error: a line for each warning, beside a progress bar too."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.addFilter(_Once())

    def emit(self, record: logging.LogRecord) -> None:
        text = f"Warning: {record.getMessage()}\n"
        with suppress(OSError, ValueError), tqdm.external_write_mode(sys.stderr):
            # A bar that is not on a terminal stays in its line.
            bars = bool(getattr(tqdm, "_instances", ()))
            sys.stderr.write(f"\n{text}" if bars and not sys.stderr.isatty() else text)
            sys.stderr.flush()


class _LogFile(logging.Handler):
    """A file that is made with its first line; until it has a name, lines wait.

    Says nothing where the file cannot be written, as on a full disk: the work itself
    meets the same disk and ends with one sentence.
    """

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(_Once())
        self.setFormatter(logging.Formatter(_LINE))
        self._path: Path | None = None
        self._waiting: list[str] = []

    def name_file(self, path: Path) -> None:
        """Append to the file at ``path`` from now on, first what was waiting."""
        self._path, waiting = path, self._waiting
        self._waiting = []
        for line in waiting:
            append_line(path, line)

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if self._path is None:
            self._waiting.append(line)
        else:
            append_line(self._path, line)


def append_line(path: Path, line: str) -> None:
    """Add a line to the file at ``path``, made if missing; nothing if that fails."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as stream:
            stream.write(f"{line}\n")


def append_warning(path: Path, text: str) -> None:
    """Add a warning to a log file, for a process that has no logger of it."""
    record = logging.LogRecord("", logging.WARNING, "", 0, text, None, None)
    append_line(path, logging.Formatter(_LINE).format(record))


@contextmanager
def report_warnings() -> Iterator[None]:
    """Tell warnings on standard error while a command runs, and keep them for a log.

    `log_to_file` gives the log its place; warnings from before go there as well.
    """
    handlers = [_Console(), _LogFile()]
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        for handler in handlers:
            logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
            for handler in handlers:
                logger.removeHandler(handler)


def log_to_file(path: Path, level: int = logging.INFO) -> None:
    """Append what is logged from ``level`` on to the file at ``path``.

    For a command within `report_warnings`. The file is made with the first line.
    """
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        for handler in logger.handlers:
            if isinstance(handler, _LogFile):
                handler.name_file(path)


def propagate_warnings() -> None:
    """Tell nothing in this process, one of several of which another tells the same."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [logging.NullHandler()]
        logger.propagate = False


class _OfThread(logging.Handler):
    """Hands warnings to whoever collects those of their thread."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.collected: dict[int, list[LoggedWarning]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        own = self.collected.get(threading.get_ident())
        if own is None:
            # Nobody would hear of it otherwise.
            os.write(2, f"Warning: {text}\n".encode())
        else:
            own.append(LoggedWarning(record.name, text))


_collector = _OfThread()


@contextmanager
def collect_warnings() -> Iterator[list[LoggedWarning]]:
    """Collect the warnings of this thread of a worker process, to be told elsewhere."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(_collector)
            logger.propagate = False
    found: list[LoggedWarning] = []
    thread = threading.get_ident()
    _collector.collected[thread] = found
    try:
        yield found
    finally:
        del _collector.collected[thread]


def log_again(warnings: Iterable[LoggedWarning]) -> None:
    """Warn here of what another process warned of."""
    for warned in warnings:
        logging.getLogger(warned.logger).warning("%s", warned.text)
