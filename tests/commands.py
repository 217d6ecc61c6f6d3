"""Runs the real command lines in this process and reads what they say."""

import re
from collections.abc import Sequence

import click
from click.testing import CliRunner, Result


def run_command(command: click.Command, arguments: Sequence[object]) -> Result:
    """Result of ``command``; an exception that is no exit is raised, as a traceback."""
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refusal(command: click.Command, arguments: Sequence[object]) -> str:
    """The one sentence with which ``command`` refuses its input, exit code 2."""
    result = run_command(command, arguments)
    assert result.exit_code == 2, result.output
    said = result.stderr.replace("\r", "\n").splitlines()
    # A progress bar may have been drawn, and a warning told, before the error was met.
    before = re.compile("(sample|step|block)/s|^Warning: ")
    lines = [s for s in said if s.strip() and not before.search(s)]
    assert len(lines) == 1, lines
    assert lines[0].startswith("Error: "), lines
    assert lines[0].endswith("."), lines
    return lines[0].removeprefix("Error: ")
