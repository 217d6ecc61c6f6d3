"""What kills and damage do to stores: nothing that a restart or `verify` does not find.

    python benchmarks/faults.py kills --count 200
    python benchmarks/faults.py flips --count 1000

``kills`` ends build, add-field, compact and hydrate with SIGKILL, at random moments and
in front of randomly chosen changes to the folder, and starts them again until they are
done; ``flips`` damages every file of a sealed store. Exit code 1 when anything is wrong.
"""

import logging
import sys
import tempfile
from pathlib import Path

import click
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


if __name__ == "__main__":
    main()
