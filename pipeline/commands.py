"""What the command lines of both stages share: errors as one sentence, log files."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import PipelineError, SpecError

if TYPE_CHECKING:
    import torch

CHECK_FAILED, BAD_INPUT = 1, 2
# Of a log that has no file yet; there are a few.
_KEPT_LINES = 1000


def one_sentence_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors a user can act on into one sentence and exit code 2.

    Warnings of the command's package, and of this one, go to standard error.
    """

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        for name in {__package__, command.__module__.partition(".")[0]}:
            warn_on_console(name)
        try:
            command(*args, **kwargs)
        except PipelineError as error:
            _refuse(str(error))
        except OSError as error:
            # A full disk, a missing right, a file where a folder should be.
            _refuse(f"{error.filename or 'The system'}: {error.strerror or error}")

    return wrapped


def _refuse(text: str) -> None:
    # As it is: the first word may be a path or a key.
    click.echo(f"Error: {text.rstrip('.')}.", err=True)
    sys.exit(BAD_INPUT)


class _LogFile(logging.FileHandler):
    """Says nothing where the log cannot be written, as on a full disk.

    The work itself meets the same disk and ends with one sentence.
    """

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def log_to_file(name: str, path: Path) -> None:
    """Append what logger ``name`` says to the file at ``path``, created if missing.

    Warnings also go to standard error.
    """
    warn_on_console(name)
    logging.getLogger(name).addHandler(_log_file(path))


@contextmanager
def logged_later(*names: str) -> Iterator[Callable[[Path], None]]:
    """Keep the lines of loggers ``names`` for a log file that is named later.

    Yields what is to be called with the file, once its folder may be made. Lines are
    dropped where it never is. Warnings go to standard error at once.
    """
    kept = MemoryHandler(_KEPT_LINES, logging.CRITICAL + 1, flushOnClose=False)
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        warn_on_console(logger.name)
        logger.addHandler(kept)

    def to_file(path: Path) -> None:
        file = _log_file(path)
        kept.setTarget(file)
        kept.flush()
        for logger in loggers:
            logger.removeHandler(kept)
            logger.addHandler(file)

    try:
        yield to_file
    finally:
        for logger in loggers:
            logger.removeHandler(kept)
        kept.close()


class _Console(logging.Handler):
    """Writes warnings to what is standard error at that moment."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("Warning: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write ``record`` as one line."""
        click.echo(self.format(record), err=True)


def warn_on_console(name: str) -> None:
    """Write warnings of logger ``name`` to standard error as ``Warning: …``."""
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Console) for handler in logger.handlers):
        logger.addHandler(_Console())


def _log_file(path: Path) -> _LogFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler


def chosen_device(name: str | None) -> "torch.device":
    """Device ``name``, or a GPU where there is one; refuses what is not there."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise SpecError(
            f"--device {name!r} cannot be used on this machine; try cpu or cuda."
        ) from None
    return device
