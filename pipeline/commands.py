"""What the command lines of both stages share: errors as one sentence, log files."""

import logging
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from pipeline.errors import PipelineError

BAD_INPUT = 2


def one_sentence_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors a user can act on into one sentence and exit code 2."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except PipelineError as error:
            text = str(error)
            sentence = text[:1].upper() + text[1:].rstrip(".") + "."
            click.echo(f"Error: {sentence}", err=True)
            sys.exit(BAD_INPUT)

    return wrapped


def log_to_file(name: str, path: Path) -> None:
    """Append what logger ``name`` says to the file at ``path``, created if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
