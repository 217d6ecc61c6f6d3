"""Rounds of durable writes of all stores, side by side."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from stores.case import Case, Writer
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
    writers: dict[str, Writer] = {flat.files: flat}
    for case in cases:
        writers.setdefault(case.files, case)
    costs: Costs = {}
    for _ in range(n_rounds):
        for files, writer in writers.items():
            shutil.rmtree(folder / files, ignore_errors=True)
            (folder / files).mkdir()
            watch = Stopwatch()
            writer.write(folder / files, samples, watch)
            watch.pause()
            cost = Cost(watch.wall, watch.cpu, len(samples), samples.n_bytes)
            costs.setdefault(files, []).append(cost)
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
