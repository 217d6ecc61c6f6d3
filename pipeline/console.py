"""What the command lines of both stages share: options, errors as one sentence."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import click

from pipeline.errors import PipelineError
from pipeline.logs import report_warnings

CHECK_FAILED, BAD_INPUT = 1, 2
# Of every program.
HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"]}


def print_result(result: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print ``result`` as JSON, or ``text`` in its place."""
    click.echo(json.dumps(result, indent=2, ensure_ascii=False) if as_json else text)


class _NamedPath(click.Path):
    """A path that names something; an empty one would stand for the current folder."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> str | bytes | os.PathLike[str]:
        """The path, refused if it is empty."""
        if not os.fspath(value):
            self.fail("it is empty; is a variable of the shell not set?", param, ctx)
        return super().convert(value, param, ctx)


PATH = _NamedPath(path_type=Path)
FILE = _NamedPath(path_type=Path, dir_okay=False)
# A folder, archive or URL.
PLACE = _NamedPath(path_type=str)
# More of them end in a crash of the libraries below torch.
THREADS = click.IntRange(1, 1024)

version_option = click.version_option(package_name="kd-train")
device_option = click.option(
    "--device",
    help="Device to compute on: cpu, cuda or cuda:1. Default: a GPU if there is one.",
)
threads_option = click.option(
    "--threads",
    type=THREADS,
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
