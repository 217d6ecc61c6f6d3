"""Our store beside other ways to keep the same ragged samples, in one run.

    python benchmarks/store.py [--samples 4000] [--only ours,LMDB]
    python benchmarks/store.py --rival-python VENV/bin/python
    python benchmarks/store.py --scale

Files go to a temporary folder below the current one. Ratios are paired within a round,
in which all stores take turns, so that other load on the machine cancels.
"""

import argparse
import os
import tempfile
from pathlib import Path

from stores.data import Samples, columns
from stores.reading import (
    BATCH,
    Rounds,
    check_identical,
    evicted_rounds,
    print_phases,
    warm_rounds,
)
from stores.registry import MEMMAP, chosen_cases
from stores.rival import Rival
from stores.scale import measure_here, print_scale
from stores.writing import print_writes, write_rounds


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Write, check, read and print."""
    samples = Samples(options.samples, columns())
    cases = chosen_cases(options.only)
    print(
        f"{len(samples):,} samples of 40-80 atoms, "
        f"{int(samples.n_atoms.sum()):,} atoms, {samples.n_bytes / 1e9:.2f} GB raw, "
        f"fully shuffled batches of {BATCH}"
    )
    writes = write_rounds(cases, folder, samples, options.write_rounds)
    checked = check_identical(cases, folder, samples)
    print(f"identical bytes from every store in {checked} batches")
    print_writes(writes, folder, samples)
    rounds = Rounds(folder, samples, options.batches)
    if options.rival_python is None:
        warm_rounds(cases, rounds, folder, options.rounds)
    else:
        with Rival(options.rival_python, folder, samples) as rival:
            rival.print_write(writes[MEMMAP.files])
            warm_rounds(cases, rounds, folder, options.rounds, rival.add_round)
    print_phases(rounds.phases, MEMMAP.name)
    evicted_rounds(cases, rounds, options.evicted_rounds)
    print_phases(rounds.phases, MEMMAP.name)


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--only", help="beginnings of names of stores, with commas")
    parser.add_argument("--batches", type=int, default=125, help="most in an epoch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--evicted-rounds", type=int, default=5)
    parser.add_argument("--write-rounds", type=int, default=3)
    parser.add_argument("--rival-python", type=Path)
    parser.add_argument("--scale", action="store_true", help="cost against size")
    parser.add_argument("--scale-step", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run what the options ask for."""
    options = parse()
    if options.scale_step:
        measure_here(int(options.scale_step[0]), Path(options.scale_step[1]))
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="store-bench-") as name:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        folder = Path(name).resolve()
        if options.scale:
            print_scale(folder)
        else:
            compare(options, folder)


if __name__ == "__main__":
    main()
