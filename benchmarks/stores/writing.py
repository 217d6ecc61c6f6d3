"""Rounds of durable writes of all stores, side by side."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from stores.case import Case
from stores.data import Samples
from stores.flat import FlatFile
from stores.reading import Costs
from stores.table import cost_cells, print_table
from stores.timing import Cost, Stopwatch, files_of

LEGEND = """\
everything from an empty folder to synced files; making the samples is not counted
x base: rate / rate of one flat file with one fsync, paired within a round
x raw: bytes on disk / bytes of the samples"""


def write_rounds(
    cases: Sequence[Case], folder: Path, samples: Samples, n_rounds: int
) -> Costs:
    """Costs of every store; the files of the last round stay, but for the flat one."""
    flat = FlatFile()
    writers = {case.files: case for case in reversed(cases)}
    writers = {case.files: writers[case.files] for case in cases}
    costs: Costs = {}
    for _ in range(n_rounds):
        for case in (flat, *writers.values()):
            shutil.rmtree(folder / case.files, ignore_errors=True)
            (folder / case.files).mkdir()
            watch = Stopwatch()
            case.write(folder / case.files, samples, watch)
            watch.pause()
            cost = Cost(watch.wall, watch.cpu, len(samples), samples.n_bytes)
            costs.setdefault(case.files, []).append(cost)
            shutil.rmtree(folder / flat.files, ignore_errors=True)
    return costs


def print_writes(costs: Costs, folder: Path, samples: Samples) -> None:
    """Table of rates, bytes and files; stores are named by their folders."""
    rows = []
    for name, values in costs.items():
        cells = cost_cells(values, costs[FlatFile.files])
        files = files_of(folder / name)
        if not files:
            rows.append([name, *cells, "1.000", "1"])
            continue
        size = sum(file.stat().st_blocks * 512 for file in files)
        ratio = f"{size / samples.n_bytes:.3f}"
        rows.append([name, *cells, ratio, f"{len(files):,}"])
    head = ["files of", "samples/s", "MB/s", "CPU s", "x base", "x raw", "files"]
    print_table("writing, synced", head, rows, LEGEND)
