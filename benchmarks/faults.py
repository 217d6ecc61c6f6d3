"""What kills and damage do to stores: nothing that a restart or `verify` does not find.

    python benchmarks/faults.py kills --count 200
    python benchmarks/faults.py flips --count 1000
    python benchmarks/faults.py together --count 20

``kills`` ends build, add-field, compact and hydrate with SIGKILL, at random moments
and in front of randomly chosen changes to the folder, and starts them again until they
are done; ``flips`` damages every file of a sealed store; ``together`` lets several
processes at one store. Exit code 1 when anything is wrong.
"""

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import faults_flips
import faults_together
import torch
from faults_kills import OPERATIONS, run_ordeals
from faults_kills import Tally as Kills

_folder = click.option(
    "--folder", type=click.Path(path_type=Path), help="Where to work; default: /tmp."
)
_seed = click.option("--seed", type=int, default=0, show_default=True)
_json = click.option("--json", "as_json", is_flag=True, help="Machine-readable.")


@click.group()
def main() -> None:
    torch.set_num_threads(1)
    # Untrained teachers have a warning for every build.
    logging.getLogger("pipeline").setLevel(logging.ERROR)


@main.command()
@click.option("--count", type=int, default=200, show_default=True, help="At random.")
@click.option("--points", type=int, help="In front of changes; default: as --count.")
@click.option(
    "--operation", "names", multiple=True, type=click.Choice(list(OPERATIONS))
)
@_seed
@_folder
@_json
def kills(
    count: int,
    points: int | None,
    names: tuple[str, ...],
    seed: int,
    folder: Path | None,
    as_json: bool,
) -> None:
    chosen = list(names or OPERATIONS)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        each = -(-count // len(chosen))
        at_points = each if points is None else -(-points // len(chosen))
        tallies = run_ordeals(chosen, each, at_points, seed, Path(made))
    _end(tallies, _kill_rows, as_json)


def _kill_rows(tallies: Mapping[str, Kills]) -> Iterable[str]:
    row = "{:<22}{:>8}{:>10}{:>8}{:>8}{:>10}{:>10}".format
    names = ("seconds", "changes", "rounds", "kills", "restarts", "failures")
    yield row("killed", *names)
    for name, one in tallies.items():
        numbers = one.rounds, one.kills, one.restarts, len(one.failures)
        yield row(name, f"{one.seconds:.2f}", one.changes, *numbers)


@main.command()
@click.option("--count", type=int, default=1000, show_default=True, help="At least.")
@_seed
@_folder
@_json
def flips(count: int, seed: int, folder: Path | None, as_json: bool) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as made:
        tallies = faults_flips.run_flips(count, seed, Path(made))
    _end(tallies, _flip_rows, as_json)


def _flip_rows(tallies: Mapping[str, faults_flips.Tally]) -> Iterable[str]:
    row = "{:<25}{:>6}{:>6}{:>11}{:>10}{:>9}{:>14}{:>16}{:>10}".format
    ways = ("bit", "truncation", "deletion")
    ends = ("found", "read refused", "all read right", "failures")
    yield row("kind of file", "files", "bits", "truncated", "deleted", *ends)
    together = [0] * 8
    for kind, tally in sorted(tallies.items()):
        numbers = [
            len(tally.files),
            *(tally.ways[way] for way in ways),
            *(tally.found, tally.refused, tally.right, len(tally.failures)),
        ]
        yield row(kind, *numbers)
        together = [a + b for a, b in zip(together, numbers, strict=True)]
    yield row("together", *together)


@main.command()
@click.option("--count", type=int, default=20, show_default=True, help="Of each scene.")
@_folder
@_json
def together(count: int, folder: Path | None, as_json: bool) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as made:
        tallies = faults_together.run_scenes(count, Path(made))
    _end(tallies, _scene_rows, as_json)


def _scene_rows(tallies: Mapping[str, faults_together.Tally]) -> Iterable[str]:
    row = "{:<24}{:>8}{:>10}  {}".format
    yield row("at one store", "rounds", "failures", "what was seen")
    for name, tally in tallies.items():
        seen = ", ".join(f"{what} {times}" for what, times in tally.seen.items())
        yield row(name, tally.rounds, len(tally.failures), seen)


def _end(
    tallies: Mapping[str, Any], rows: Callable[[Any], Iterable[str]], as_json: bool
) -> None:
    """Print a table and all failures, or the same as JSON; exit 1 on a failure."""
    if as_json:
        found = {name: vars(tally) for name, tally in tallies.items()}
        click.echo(json.dumps(found, default=sorted))
    else:
        for line in rows(tallies):
            click.echo(line)
        for name, tally in tallies.items():
            for failure in tally.failures:
                click.echo(f"{name}: {failure}")
    if any(tally.failures for tally in tallies.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
