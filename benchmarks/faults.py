"""What kills and damage do to stores: nothing that a restart or `verify` does not find.

    python benchmarks/faults.py kills --count 200
    python benchmarks/faults.py flips --count 1000
    python benchmarks/faults.py together --count 20

``kills`` ends build, add-field, compact and hydrate with SIGKILL, at random moments
and in front of randomly chosen changes to the folder, and starts them again until they
are done; ``flips`` damages every file of a sealed store; ``together`` lets several
processes at one store. Exit code 1 when anything is wrong.
"""

import logging
import sys
import tempfile
from pathlib import Path

import click
import faults_flips
import faults_together
import torch
from faults_kills import OPERATIONS, Tally, run_ordeals

_folder = click.option(
    "--folder", type=click.Path(path_type=Path), help="Where to work; default: /tmp."
)
_seed = click.option("--seed", type=int, default=0, show_default=True)


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
def kills(
    count: int,
    points: int | None,
    names: tuple[str, ...],
    seed: int,
    folder: Path | None,
) -> None:
    chosen = list(names or OPERATIONS)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        each = -(-count // len(chosen))
        at_points = each if points is None else -(-points // len(chosen))
        tallies = run_ordeals(chosen, each, at_points, seed, Path(made))
    _print_kills(tallies)
    if any(tally.failures for tally in tallies.values()):
        sys.exit(1)


def _print_kills(tallies: dict[tuple[str, str], Tally]) -> None:
    row = "{:<12}{:<10}{:>8}{:>8}{:>10}{:>10}".format
    print(row("operation", "killed at", "rounds", "kills", "restarts", "failures"))
    for (name, way), tally in tallies.items():
        failures = len(tally.failures)
        print(row(name, way, tally.rounds, tally.kills, tally.restarts, failures))
    for (name, way), tally in tallies.items():
        for failure in tally.failures:
            print(f"{name}, {way}: {failure}")


@main.command()
@click.option("--count", type=int, default=1000, show_default=True, help="At least.")
@_seed
@_folder
def flips(count: int, seed: int, folder: Path | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as made:
        tallies = faults_flips.run_flips(count, seed, Path(made))
    _print_flips(tallies)
    if any(tally.failures for tally in tallies.values()):
        sys.exit(1)


def _print_flips(tallies: dict[str, faults_flips.Tally]) -> None:
    row = "{:<25}{:>6}{:>6}{:>11}{:>10}{:>9}{:>14}{:>16}{:>10}".format
    ways = ("bit", "truncation", "deletion")
    ends = ("found", "read refused", "all read right", "failures")
    print(row("kind of file", "files", "bits", "truncated", "deleted", *ends))
    total = [0] * 8
    for kind, tally in sorted(tallies.items()):
        numbers = [
            len(tally.files),
            *(tally.ways[way] for way in ways),
            *(tally.found, tally.refused, tally.right, len(tally.failures)),
        ]
        print(row(kind, *numbers))
        total = [a + b for a, b in zip(total, numbers, strict=True)]
    print(row("together", *total))
    for tally in tallies.values():
        for failure in tally.failures:
            print(failure)


@main.command()
@click.option("--count", type=int, default=20, show_default=True, help="Of each scene.")
@_folder
def together(count: int, folder: Path | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as made:
        tallies = faults_together.run_scenes(count, Path(made))
    row = "{:<24}{:>8}{:>10}  {}".format
    print(row("at one store", "rounds", "failures", "what was seen"))
    for name, tally in tallies.items():
        seen = ", ".join(f"{what} {times}" for what, times in tally.seen.items())
        print(row(name, tally.rounds, len(tally.failures), seen))
    for name, tally in tallies.items():
        for failure in tally.failures:
            print(f"{name}: {failure}")
    if any(tally.failures for tally in tallies.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
