"""``kd-sweep``: lists, trains and reports the runs of a sweep file."""

from pathlib import Path

import click

from pipeline.console import (
    HELP,
    PATH,
    json_option,
    one_sentence_errors,
    print_result,
    version_option,
)

_FILE = click.argument("file", type=PATH)


@click.group(context_settings=HELP)
@version_option
def main() -> None:
    """Train many students on one store.

    Snakemake's rule sweep calls these commands.
    """


@main.command("list")
@_FILE
@json_option
@one_sentence_errors
def list_command(file: Path, as_json: bool) -> None:
    """Check the sweep in FILE and show its runs and how far each is."""
    from kd_train.sweep.plan import make_plan
    from kd_train.sweep.table import run_states, status_lines

    states = run_states(make_plan(file))
    print_result({"runs": states}, status_lines(states), as_json)


@main.command("run")
@_FILE
@click.argument("name")
@click.option(
    "--attempt",
    default=1,
    show_default=True,
    help="Number of the attempt, which outcome.json records.",
)
@one_sentence_errors
def run_command(file: Path, name: str, attempt: int) -> None:
    """Train the run NAME of FILE, from its last checkpoint if there is one.

    A failed run is recorded in outcome.json of its folder; the exit code is still 0.
    """
    from kd_train.sweep.grid import load_sweep
    from kd_train.sweep.jobs import run_job

    outcome = run_job(load_sweep(file), name, attempt)
    said = "" if outcome.error is None else f": {outcome.error}"
    click.echo(f"{name} {outcome.state}{said}")


@main.command("report")
@_FILE
@one_sentence_errors
def report_command(file: Path) -> None:
    """Compare the finished runs of FILE, and list failed and skipped runs."""
    from kd_train.sweep.plan import make_plan
    from kd_train.sweep.table import write_sweep_report

    click.echo(write_sweep_report(make_plan(file)), nl=False)
