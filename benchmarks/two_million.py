"""What a sample costs in a store of millions: planned, built, opened, shuffled, read.

    python benchmarks/two_million.py FOLDER --samples 20000 --samples 2000000

Each size is a synthetic dataset of three-atom molecules in .aselmdb files, labelled by
a random PaiNN of four channels, so that what is measured is this program and not the
teacher. Every step runs in a process of its own, which reports its time and the memory
it took; with several sizes, the last column is the cost per sample of the last divided
by that of the first. Times of small sizes are the least of ``--repeats`` runs. FOLDER
needs 1.3 kB a sample and can be removed afterwards.
"""

import itertools
import json
import resource
import shutil
import subprocess
import sys
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
    from pipeline.spec import load_spec

    return load_spec(make_spec(folder))


def index_pass(folder: Path, workers: int) -> Measured:
    """Open the dataset with nothing kept of it."""
    from pipeline.datasets import open_split
    from pipeline.passes import processes

    split = _loaded(folder).splits["train"]
    with processes(workers) as run:
        started = time.perf_counter()
        open_split(split, lambda dataset: dataset.list_samples(run))
        return {"index pass s": time.perf_counter() - started}


def plan(folder: Path, workers: int) -> Measured:
    """Everything up to an empty store."""
    from pipeline.build import create_or_match, prepare

    spec = _loaded(folder)
    store = Path(spec.store.path)
    for made in (store, store.with_name(store.name + ".index")):
        shutil.rmtree(made, ignore_errors=True)
    started = time.perf_counter()
    job = prepare(spec, workers=workers)
    prepared = time.perf_counter()
    create_or_match(job, store)
    done = time.perf_counter()
    return {
        "planning s": prepared - started,
        "creating the store s": done - prepared,
        "plan memory bytes": _peak(),
    }


def plan_again(folder: Path, workers: int) -> Measured:
    """What each job of an array does before its first block."""
    from pipeline.build import create_or_match, prepare

    spec = _loaded(folder)
    started = time.perf_counter()
    create_or_match(prepare(spec), Path(spec.store.path))
    return {"planning again s": time.perf_counter() - started}


def fill(folder: Path, workers: int) -> Measured:
    """Every block, and the seal."""
    from pipeline.build import build_store
    from pipeline.store.writer import StoreWriter

    spec = _loaded(folder)
    marks = [time.perf_counter()]
    build_store(spec, workers=workers, report=lambda *_: marks.append(_now()))
    done = time.perf_counter()
    store = Path(spec.store.path)
    size = sum(f.stat().st_size for f in store.rglob("*") if f.is_file())
    index = sum(
        f.stat().st_size
        for f in (store / "train" / "index").rglob("*")
        if f.is_file() and "commit" not in f.parts
    )
    return {
        "filling s": marks[-1] - marks[0],
        "sealing s": done - marks[-1],
        "fill memory bytes": _peak(),
        "store bytes": size,
        "index bytes": index,
        "blocks": StoreWriter(store).splits["train"].n_blocks,
    }


def verify(folder: Path, workers: int) -> Measured:
    """Every byte of the store."""
    from pipeline.store.verify import verify_store

    started = time.perf_counter()
    assert not verify_store(folder / "store.zarr", workers)
    return {"verifying s": time.perf_counter() - started}


def open_store(folder: Path, workers: int) -> Measured:
    """Open the store; memory beyond that of the imports."""
    from pipeline.store.reader import FeatureStore

    before = _resident()
    started = time.perf_counter()
    store = FeatureStore.open(folder / "store.zarr")
    opened = time.perf_counter()
    held = _resident() - before
    split = store.splits["train"]
    split.position(str(split.sample_ids[-1]))
    return {
        "opening s": opened - started,
        "opened memory bytes": held,
        "first look-up s": time.perf_counter() - opened,
    }


def epoch(folder: Path, workers: int) -> Measured:
    """One shuffled epoch through the reader, in batches; no graphs, no student."""
    from kd_train.order import BatchRule, Draw, training_batches
    from pipeline.store.reader import FeatureStore

    split = FeatureStore.open(folder / "store.zarr").splits["train"]
    paths = [path for path in split.index.arrays if not path.startswith("teacher/")]
    blocks = [split.block_positions(block) for block in range(split.n_blocks)]
    rule = BatchRule(0, BATCH)
    started = time.perf_counter()
    draws = training_batches(blocks, split.n_atoms, rule)
    first: Draw = next(draws)
    ordered = time.perf_counter()
    _read_epoch(split, paths, first, draws)
    cold = time.perf_counter()
    _read_epoch(split, paths, next(draws), draws)
    return {
        "first batch's order s": ordered - started,
        "epoch, chunks checked s": cold - ordered,
        "epoch s": time.perf_counter() - cold,
        "epoch memory bytes": _peak(),
    }


def _read_epoch(split: Any, paths: list[str], first: Any, draws: Any) -> None:
    same = itertools.takewhile(lambda draw: draw.epoch == first.epoch, draws)
    total = 0
    for draw in itertools.chain([first], same):
        total += len(split.read_stored(draw.positions, paths)["labels/energy"])
    # The batch that ended the loop belongs to the next epoch and was not read.
    assert total >= len(split) - BATCH, total


def batches(folder: Path, workers: int) -> Measured:
    """Training batches with their graphs, of the first 20 000 samples of an epoch."""
    from kd_train.data import CachedSamples
    from kd_train.order import BatchRule, epoch_batches
    from pipeline.graphs.neighbors import GraphRule
    from pipeline.store.reader import FeatureStore

    split = FeatureStore.open(folder / "store.zarr").splits["train"]
    rule = GraphRule(TEACHER["cutoff"], int(TEACHER["max_neighbors"]), True)
    samples = CachedSamples(split, rule, (1, 8), ("node_features", "vector_features"))
    blocks = [split.block_positions(block) for block in range(split.n_blocks)]
    drawn = epoch_batches(blocks, split.n_atoms, BatchRule(0, BATCH), 0, 0)
    count = min(len(drawn), 20_000 // BATCH)
    started = time.perf_counter()
    for positions in drawn[:count]:
        samples.batch(positions)
    seconds = time.perf_counter() - started
    # Per sample of the store, so that it compares with other sizes.
    return {"batches with graphs s": seconds * len(split) / (count * BATCH)}


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


def _now() -> float:
    return time.perf_counter()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _in_process(step: str, folder: Path, workers: int) -> Measured:
    command = [sys.executable, __file__, str(folder), "--step", step]
    done = subprocess.run(
        [*command, "--workers", str(workers)], check=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout.decode().splitlines()[-1])


def measure(folder: Path, samples: int, workers: int, repeats: int) -> Measured:
    """All steps at one size; times are the least of the repeats."""
    started = time.perf_counter()
    found = make_data(folder, samples)
    click.echo(f"{samples}: data made in {_now() - started:.0f} s", err=True)
    for step in STEPS:
        runs = []
        for number in range(repeats):
            if step == "fill" and number:
                _in_process("plan", folder, workers)
            runs.append(_in_process(step, folder, workers))
        found |= {name: min(run[name] for run in runs) for name in runs[0]}
        click.echo(f"{samples}: {step} {json.dumps(runs[0])}", err=True)
    return found


def table(results: dict[int, Measured]) -> str:
    """A line per measure: cost per sample at each size, and last divided by first."""
    sizes = list(results)
    head = "".join(f"{size:>14,}" for size in sizes)
    lines = [f"{'per sample':30}{head}{'ratio':>9}"]
    for name in results[sizes[0]]:
        what, unit, scale = name, "", 1.0
        if name.endswith(" s"):
            what, unit, scale = name[:-2], "µs", 1e6
        elif name.endswith(" bytes"):
            what, unit = name[:-6], "B"
        each = [scale * results[size][name] / size for size in sizes]
        row = "".join(f"{value:14.3f}" for value in each)
        lines.append(f"{f'{what} ({unit})':30}{row}{each[-1] / each[0]:9.2f}")
    return "\n".join(lines)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--samples", multiple=True, type=int, default=(20_000, 2_000_000))
@click.option("--workers", type=int, default=0, help="Of planning, filling, verifying.")
@click.option("--repeats", type=int, default=3, help="Of sizes up to 100 000.")
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
        click.echo(json.dumps(STEPS[step](folder, workers)))
        return
    results = {}
    for size in samples:
        place = folder / str(size)
        place.mkdir(parents=True, exist_ok=True)
        times = repeats if size <= SMALL else 1
        results[size] = measure(place, size, workers, times)
        (folder / "results.json").write_text(json.dumps(results, indent=2))
        if not keep:
            shutil.rmtree(place)
    click.echo(table(results))


if __name__ == "__main__":
    main()
