"""What the command lines of both stages share: errors as one sentence."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from pipeline.errors import PipelineError
from pipeline.logs import report_warnings

CHECK_FAILED, BAD_INPUT = 1, 2


def one_sentence_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors a user can act on into one sentence and exit code 2.

    Warnings meanwhile go to standard error, and into the log file where there is one.
    """

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            with report_warnings():
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
