"""What a sample costs in a store of millions: planned, built, opened, shuffled, read.

    python benchmarks/two_million.py FOLDER --samples 20000 --samples 2000000

Each size is a synthetic dataset of three-atom molecules in .aselmdb files, labelled by
a random PaiNN of four channels, so that what is measured is this program and not the
teacher. Every step runs in a process of its own, which reports its time and the memory
it took; with several sizes, the last column is the cost per sample of the last divided
by that of the first. Machines change their speed within minutes, so each step is done
at all sizes before the next one, and at small sizes ``--repeats`` times before and
after the large ones; what is told are medians, by the clock and by the processor.
FOLDER needs 1.3 kB a sample and can be removed afterwards.
"""

import json
import re
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import lmdb
import numpy as np
import yaml

ROWS_PER_FILE = 50_000
ROWS_PER_BLOCK = 131_072
BATCH = 256
SMALL = 100_000
TEACHER = {
    "hidden_channels": 4,
    "num_layers": 1,
    "num_rbf": 8,
    "cutoff": 4.0,
    "max_neighbors": 8,
}
WATER = np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
Measured = dict[str, float]


class Clock:
    """Seconds since it was made or asked last, of the clock and of the processor."""

    def __init__(self) -> None:
        self._last = self._now()

    def lap(self, what: str) -> Measured:
        """Time of ``what``, which has just ended."""
        before, self._last = self._last, self._now()
        wall, processor = (b - a for a, b in zip(before, self._last, strict=True))
        return {f"{what} s": wall, f"{what}, processor s": processor}

    def _now(self) -> tuple[float, float]:
        used = [resource.getrusage(who) for who in (0, resource.RUSAGE_CHILDREN)]
        return time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in used)


def make_data(folder: Path, samples: int) -> Measured:
    """Distorted water molecules with random labels, 50 000 in a file."""
    data = folder / "data"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for first in range(0, samples, ROWS_PER_FILE):
        count = min(ROWS_PER_FILE, samples - first)
        _write_file(data / f"{first:09d}.aselmdb", first, count, generator)
    size = sum(file.stat().st_size for file in data.iterdir())
    return {"dataset bytes": size}


def _write_file(
    file: Path, first: int, count: int, generator: np.random.Generator
) -> None:
    moved = np.round(WATER + generator.normal(0, 0.05, (count, 3, 3)), 6)
    energies = np.round(generator.normal(-76.0, 0.1, count), 6)
    forces = np.round(generator.normal(0, 1.0, (count, 3, 3)), 6)
    environment = lmdb.open(
        str(file), subdir=False, map_size=1 << 30, lock=False, sync=False
    )
    with environment.begin(write=True) as transaction:
        for row in range(count):
            text = _row(first + row, moved[row], energies[row], forces[row])
            packed = zlib.compress(text.encode(), 1)
            transaction.put(str(row + 1).encode(), packed, append=False)
    environment.close()


def _row(number: int, positions: Any, energy: float, forces: Any) -> str:
    def array(values: Any) -> dict[str, Any]:
        flat = np.asarray(values)
        return {"__ndarray__": [flat.shape, str(flat.dtype), flat.ravel().tolist()]}

    return json.dumps(
        {
            "numbers": array([8, 1, 1]),
            "positions": array(positions),
            "energy": energy,
            "forces": array(forces),
            "data": {"sid": number // 100, "fid": number % 100},
        }
    )


def make_spec(folder: Path) -> Path:
    """Spec of the store, with the teacher beside it."""
    import torch

    from pipeline.models.checkpoint import save_model
    from pipeline.models.normalizer import Normalizer
    from pipeline.models.zoo import build_model

    torch.manual_seed(0)
    teacher = folder / "teacher.safetensors"
    save_model(teacher, "painn", build_model("painn", TEACHER), Normalizer(), {})
    document = {
        "teacher": {
            "model": "painn",
            "checkpoint": str(teacher),
            "batch_atoms": 12288,
        },
        "splits": {"train": {"format": "aselmdb", "path": str(folder / "data")}},
        "features": {"node_features": {}, "vector_features": {}},
        "store": {
            "path": str(folder / "store.zarr"),
            "rows_per_block": ROWS_PER_BLOCK,
        },
    }
    spec = folder / "spec.yaml"
    spec.write_text(yaml.safe_dump(document))
    return spec


def _loaded(folder: Path) -> Any:
    from pipeline.spec.cache_spec import load_spec

    return load_spec(make_spec(folder))


def index_pass(folder: Path, workers: int) -> Measured:
    """Open the dataset with nothing kept of it."""
    from pipeline.datasets import open_split
    from pipeline.parallel.ordered_map import processes

    split = _loaded(folder).splits["train"]
    clock = Clock()
    with processes(workers) as run:
        open_split(split, lambda dataset: dataset.list_samples(run))
    return clock.lap("index pass")


def plan(folder: Path, workers: int) -> Measured:
    """Everything up to an empty store."""
    from pipeline.build.build import create_or_match, make_build_plan

    spec = _loaded(folder)
    store = Path(spec.store.path)
    for made in (store, store.with_name(store.name + ".index")):
        shutil.rmtree(made, ignore_errors=True)
    clock = Clock()
    job = make_build_plan(spec, workers=workers)
    found = clock.lap("planning")
    create_or_match(job, store)
    return found | clock.lap("creating the store")


def plan_again(folder: Path, workers: int) -> Measured:
    """What each job of an array does before its first block."""
    from pipeline.build.build import create_or_match, make_build_plan

    spec = _loaded(folder)
    clock = Clock()
    create_or_match(make_build_plan(spec), Path(spec.store.path))
    return clock.lap("planning again")


def fill(folder: Path, workers: int) -> Measured:
    """Every block, and the seal."""
    from pipeline.build.build import build_store
    from pipeline.build.worker import FillOptions

    spec = _loaded(folder)
    store = Path(spec.store.path)
    clock = Clock()
    laps: Measured = {}

    def last(split: str, samples: int, left: int) -> None:
        if not left:
            laps.update(clock.lap("filling"))

    build_store(spec, filling=FillOptions(workers=workers), report=last)
    return {
        **laps,
        **clock.lap("sealing"),
        "store bytes": _size(store),
        "index bytes": _size(store / "train/index")
        - _size(store / "train/index/commit"),
    }


def verify(folder: Path, workers: int) -> Measured:
    """Every byte of the store."""
    from pipeline.store.verify import verify_store

    clock = Clock()
    assert not verify_store(folder / "store.zarr", workers)
    return clock.lap("verifying")


def open_store(folder: Path, workers: int) -> Measured:
    """Open the store; memory beyond that of the imports."""
    from pipeline.store.reader import FeatureStore

    before = Memory.now()
    clock = Clock()
    split = FeatureStore.open(folder / "store.zarr").splits["train"]
    found = clock.lap("opening") | {"opened memory bytes": Memory.now() - before}
    split.position(str(split.sample_ids[-1]))
    return found | clock.lap("first look-up")


def epoch(folder: Path, workers: int) -> Measured:
    """Shuffled epochs through the reader, in batches; no graphs, no student.

    Samples are shuffled among 16 blocks at a time, as training does, and at last among
    those of one block: the small store lies in the processor's cache as a whole, and so
    does one block of the large one.
    """
    from kd_train.loader.sampler import SamplerConfig, epoch_batches
    from pipeline.store.reader import FeatureStore

    split = FeatureStore.open(folder / "store.zarr").splits["train"]
    paths = [path for path in split.index.arrays if not path.startswith("teacher/")]
    blocks = [split.block_positions(block) for block in range(split.n_blocks)]
    found: Measured = {}
    clock = Clock()
    names = {
        "epoch, chunks checked": 16,
        "epoch": 16,
        "epoch, in one block's window": 1,
    }
    for number, (name, window) in enumerate(names.items()):
        rule = SamplerConfig(0, BATCH, shuffle_blocks=window)
        batches = epoch_batches(blocks, split.n_atoms, rule, number, 0)
        found |= clock.lap("order of an epoch")
        for positions in batches:
            split.read_stored(positions, paths)
        found |= clock.lap(name)
    return found


def batches(folder: Path, workers: int) -> Measured:
    """Training batches with their graphs, of the first 20 000 samples of an epoch.

    Chunks are checked before: 20 000 samples touch those of many more.
    """
    from kd_train.loader.data import CachedSamples
    from kd_train.loader.sampler import SamplerConfig, epoch_batches
    from pipeline.graphs.neighbors import NeighborSpec
    from pipeline.store.reader import FeatureStore

    split = FeatureStore.open(folder / "store.zarr").splits["train"]
    rule = NeighborSpec(TEACHER["cutoff"], int(TEACHER["max_neighbors"]), True)
    paths = [path for path in split.index.arrays if not path.startswith("teacher/")]
    for block in range(split.n_blocks):
        split.read_stored(split.block_positions(block), paths)
    samples = CachedSamples(split, rule, (1, 8), ("node_features", "vector_features"))
    blocks = [split.block_positions(block) for block in range(split.n_blocks)]
    drawn = epoch_batches(blocks, split.n_atoms, SamplerConfig(0, BATCH), 0, 0)
    count = min(len(drawn), 20_000 // BATCH)
    clock = Clock()
    for positions in drawn[:count]:
        samples.batch(positions)
    # As if of all samples, so that it compares with other sizes.
    share = len(split) / (count * BATCH)
    found = clock.lap("batches with graphs")
    return {name: seconds * share for name, seconds in found.items()}


STEPS: dict[str, Callable[[Path, int], Measured]] = {
    "index": index_pass,
    "plan": plan,
    "again": plan_again,
    "fill": fill,
    "verify": verify,
    "open": open_store,
    "epoch": epoch,
    "batches": batches,
}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


class Memory(threading.Thread):
    """Largest memory of this process; pages of the files that it maps do not count."""

    def __init__(self, pause: float = 0.1) -> None:
        super().__init__(daemon=True)
        self._pause = pause
        self.largest = self.now()
        self.start()

    @staticmethod
    def now() -> int:
        """Bytes of anonymous memory that are resident."""
        told = Path("/proc/self/status").read_text()
        found = re.search(r"RssAnon:\s+(\d+) kB", told)
        return int(found[1]) * 1024 if found else 0

    def run(self) -> None:
        """Look again and again, after ``pause`` seconds."""
        while True:
            time.sleep(self._pause)
            self.largest = max(self.largest, self.now())


def _in_process(step: str, folder: Path, workers: int) -> Measured:
    command = [sys.executable, __file__, str(folder), "--step", step]
    done = subprocess.run(
        [*command, "--workers", str(workers)], check=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout.decode().splitlines()[-1])


def by_turns(
    step: str, folder: Path, samples: tuple[int, ...], workers: int, repeats: int
) -> dict[int, Measured]:
    """One step at every size; medians of the repeats of small sizes."""
    small = [size for size in samples if size <= SMALL] * repeats
    large = [size for size in samples if size > SMALL]
    runs: dict[int, list[Measured]] = {size: [] for size in samples}
    for size in [*small, *large, *(small if large else [])]:
        place = folder / str(size)
        if step == "fill" and runs[size]:
            _in_process("plan", place, workers)
        runs[size].append(_in_process(step, place, workers))
        click.echo(f"{size}: {step} {json.dumps(runs[size][-1])}", err=True)
    return {
        size: {name: statistics.median(run[name] for run in told) for name in told[0]}
        for size, told in runs.items()
    }


def table(results: dict[int, Measured]) -> str:
    """A line per measure: cost per sample at each size, and last divided by first.

    Memory is told as a whole, in MB, and how much of it each further sample takes.
    """
    sizes = list(results)
    first, last = sizes[0], sizes[-1]
    head = "".join(f"{size:>14,}" for size in sizes)
    lines = [f"{'per sample':46}{head}{'ratio':>10}"]
    for name in results[first]:
        values = {size: results[size][name] for size in sizes}
        if "memory" in name:
            what, unit, scale = name.removesuffix(" bytes"), "MB, not each", 1e-6
            shown = values
            growth = (values[last] - values[first]) / max(last - first, 1)
            told = f"+{growth:.0f} B"
        else:
            seconds = name.endswith(" s")
            what = name.removesuffix(" s").removesuffix(" bytes")
            unit, scale = ("µs", 1e6) if seconds else ("B", 1.0)
            shown = {size: value / size for size, value in values.items()}
            told = f"{shown[last] / shown[first]:.2f}"
        row = "".join(f"{scale * value:14.3f}" for value in shown.values())
        lines.append(f"{f'{what} ({unit})':46}{row}{told:>10}")
    return "\n".join(lines)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--samples", multiple=True, type=int, default=(20_000, 2_000_000))
@click.option("--workers", type=int, default=0, help="Of planning, filling, verifying.")
@click.option("--repeats", type=int, default=2, help="Of sizes up to 100 000.")
@click.option("--keep", is_flag=True, help="Leave data and stores where they are.")
@click.option("--step", type=click.Choice(list(STEPS)), help="Only this, as JSON.")
def main(
    folder: Path,
    samples: tuple[int, ...],
    workers: int,
    repeats: int,
    keep: bool,
    step: str | None,
) -> None:
    """Measure costs per sample at all sizes in FOLDER."""
    if step is not None:
        memory = Memory()
        told = STEPS[step](folder, workers)
        peak = {f"memory of {step} bytes": max(memory.largest, memory.now())}
        click.echo(json.dumps(told | peak))
        return
    results = {size: make_data(folder / str(size), size) for size in samples}
    for name in STEPS:
        for size, told in by_turns(name, folder, samples, workers, repeats).items():
            results[size] |= told
        (folder / "results.json").write_text(json.dumps(results, indent=2))
    if not keep:
        for size in samples:
            shutil.rmtree(folder / str(size))
    click.echo(table(results))


if __name__ == "__main__":
    main()
