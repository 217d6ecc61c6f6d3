"""Cost of a sample, time to open and memory against the number of samples."""

import json
import resource
import shutil
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

from stores.data import Samples, columns, shuffled_batches
from stores.reading import BATCH
from stores.registry import MEMMAP, PROFILES
from stores.table import print_table
from stores.timing import Stopwatch, time_reads, warm_up

SIZES = (4_000, 40_000, 400_000)
WIDTH = 16
BATCHES = 125
REPEATS = 5
LEGEND = f"""\
{WIDTH} channels, fully shuffled batches of {BATCH}, {BATCHES} of them, page cache warm
open: seconds until the first read can start
first, later: microseconds of processor time a sample in the first {BATCHES} batches
(checksums of every chunk touched) and in the {REPEATS} times {BATCHES} after them (median)
own MB: resident memory that is not pages of files, after opening and after all reads"""


def print_scale(folder: Path) -> None:
    """Measure every size in a process of its own and print the table."""
    rows = []
    for size in SIZES:
        for case in (MEMMAP, *PROFILES):
            samples = Samples(size, columns(WIDTH, 0))
            place = folder / case.files
            place.mkdir()
            case.write(place, samples, Stopwatch())
            command = [sys.executable, *sys.argv[:1], "--scale-step", str(size), place]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            cells = json.loads(output)
            rows.append([f"{size:,}", case.name, *cells])
            shutil.rmtree(place)
    head = ["samples", "store", "open s", "first us", "later us", "own MB", "after MB"]
    print_table("cost against size", head, rows, LEGEND)


def measure_here(size: int, place: Path) -> None:
    """Open and read the store at ``place``; prints a JSON list of the table's cells."""
    case = next(c for c in (MEMMAP, *PROFILES) if c.files == place.name)
    samples = Samples(size, columns(WIDTH, 0))
    warm_up(place)
    before = own_memory()
    begin = time.perf_counter()
    with closing(case.open(place, samples)) as reader:
        opened = time.perf_counter() - begin
        after_open = own_memory() - before
        costs = []
        for repeat in range(REPEATS + 1):
            batches = shuffled_batches(size, BATCH, BATCHES, repeat)
            cost = time_reads(reader.read, batches, samples.bytes_of)
            costs.append(cost.cpu / cost.samples * 1e6)
        after_reads = own_memory() - before
    first, later = costs[0], sorted(costs[1:])[REPEATS // 2]
    cells = [opened, first, later, after_open, after_reads]
    print(json.dumps([f"{cell:.3g}" for cell in cells]))


def own_memory() -> float:
    """Megabytes of this process that no file backs."""
    fields = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text().splitlines()
    )
    return int(fields["RssAnon"].split()[0]) * resource.getpagesize() / 4096 / 1e3
