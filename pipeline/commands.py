"""What the command lines of both stages share: errors as one sentence, log files."""

import logging
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import PipelineError, SpecError

if TYPE_CHECKING:
    import torch

CHECK_FAILED, BAD_INPUT = 1, 2


def one_sentence_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors a user can act on into one sentence and exit code 2."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except PipelineError as error:
            _refuse(str(error))
        except OSError as error:
            # A full disk, a missing right, a file where a folder should be.
            _refuse(f"{error.filename or 'The system'}: {error.strerror or error}")

    return wrapped


def _refuse(text: str) -> None:
    first = text.split(maxsplit=1)[0]
    start = text[:1].upper() if first.isalpha() else text[:1]
    click.echo(f"Error: {start}{text[1:].rstrip('.')}.", err=True)
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
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    warn_on_console(name)


class _Console(logging.Handler):
    """Warnings on what standard error is when they come."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(self.format(record), err=True)


def warn_on_console(name: str) -> None:
    """Write warnings of logger ``name`` to standard error, each once."""
    logger = logging.getLogger(name)
    if any(isinstance(handler, _Console) for handler in logger.handlers):
        return
    console = _Console(logging.WARNING)
    console.setFormatter(logging.Formatter("Warning: %(message)s"))
    logger.addHandler(console)


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
