"""Cost of a sample, time to open and memory against the number of samples."""

import json
import shutil
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from statistics import median

from stores.case import Case, Reader
from stores.data import Samples, columns, shuffled_batches
from stores.reading import BATCH
from stores.registry import MEMMAP, PROFILES
from stores.table import print_table
from stores.timing import Stopwatch, time_reads, warm_up

SIZES = (4_000, 40_000, 400_000)
WIDTH = 16
BATCHES = 125
REPEATS = 5
CASES: tuple[Case, ...] = (MEMMAP, *PROFILES)
COLUMNS = ("open s", "first us", "later us", "open MB", "after MB", "RSS MB")
LEGEND = f"""\
{WIDTH} channels, fully shuffled batches of {BATCH}, page cache warm
open s: seconds from a path to a reader
first, later us: microseconds of processor time a sample, in the whole first epoch
(with all checksums) and in {BATCHES} batches after it (median of {REPEATS})
open, after MB: memory of the process's own (no file behind it), after opening and
after all reads; RSS MB: everything, with the pages of mapped files, at the end"""


def print_scale(folder: Path) -> None:
    """Measure every size in a process of its own and print the table."""
    rows = []
    for size in SIZES:
        for case in CASES:
            samples = Samples(size, columns(WIDTH, 0))
            place = folder / case.files
            place.mkdir()
            case.write(place, samples, Stopwatch())
            command = [sys.executable, *sys.argv[:1], "--scale-step"]
            command += [str(size), str(place)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            cells = json.loads(output)
            rows.append([f"{size:,}", case.name, *cells])
            shutil.rmtree(place)
    head = ["samples", "store", *COLUMNS]
    print_table("cost against size", head, rows, LEGEND)


def measure_here(size: int, place: Path) -> None:
    """Open and read the store at ``place``; prints a JSON list of the table's cells."""
    case = next(c for c in CASES if c.files == place.name)
    samples = Samples(size, columns(WIDTH, 0))
    warm_up(place)
    before = resident("RssAnon")
    begin = time.perf_counter()
    with closing(case.open(place, samples)) as reader:
        opened = time.perf_counter() - begin
        after_open = resident("RssAnon") - before
        first = _microseconds(reader, samples, limit=size, seed=0)
        later = [
            _microseconds(reader, samples, BATCHES, seed)
            for seed in range(1, REPEATS + 1)
        ]
        after_reads = resident("RssAnon") - before
        whole = resident("VmRSS")
    cells = [opened, first, median(later), after_open, after_reads, whole]
    print(json.dumps([f"{cell:.3g}" for cell in cells]))


def _microseconds(reader: Reader, samples: Samples, limit: int, seed: int) -> float:
    batches = shuffled_batches(len(samples), BATCH, limit, seed)
    cost = time_reads(reader.read, batches, samples.bytes_of)
    return cost.cpu / cost.samples * 1e6


def resident(kind: str) -> float:
    """Megabytes of this process: ``RssAnon``, its own; ``VmRSS``, with files' pages."""
    lines = Path("/proc/self/status").read_text().splitlines()
    value = next(line for line in lines if line.startswith(kind)).split()[1]
    return int(value) * 1024 / 1e6
