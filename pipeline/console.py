"""What the command lines of both stages share: options, errors as one sentence."""

import json
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import click

from pipeline.errors import PipelineError
from pipeline.logs import warnings_told

CHECK_FAILED, BAD_INPUT = 1, 2
# Of every program.
HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"]}

version_option = click.version_option(package_name="kd-train")
device_option = click.option(
    "--device",
    help="Device to compute on: cpu, cuda or cuda:1. Default: a GPU if there is one.",
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(1, 4096),
    help="Number of CPU threads of torch. Default: torch chooses it.",
)
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY.SUBKEY=VALUE",
    help="Value of one key of the file; may be repeated. Default: the file's values.",
)
json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Format of the output: JSON. Default: text.",
)


def print_result(result: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print ``result`` as JSON, or ``text`` in its place."""
    click.echo(json.dumps(result, indent=2, ensure_ascii=False) if as_json else text)


def one_sentence_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors a user can act on into one sentence and exit code 2.

    Warnings meanwhile go to standard error, and into the log file where there is one.
    """

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings_told():
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
