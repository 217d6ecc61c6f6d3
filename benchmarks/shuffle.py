"""Whether a block shuffle is as good as a full shuffle of all samples.

    python benchmarks/shuffle.py order
    python benchmarks/shuffle.py train STORE --config cache_specs/demo/student.yaml

``order`` needs no data: labels of trajectories, 90 % of whose variance lies between
systems, are batched by the loader's own functions. ``train`` trains one student on a
store with different buffers and with one buffer that holds all blocks, which is a full
shuffle, for equal steps from equal weights.
"""

import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import torch

from kd_train.config.train_config import load_config
from kd_train.loader.sampler import SamplerConfig, epoch_batches
from kd_train.trainer.trainer import Trainer
from pipeline.store.layout import storage_order
from pipeline.store.reader import FeatureStore

SYSTEMS, FRAMES = 2000, 50
BETWEEN = 0.9
BATCH_SIZE = 32
EPOCHS = 10
BLOCKS = (112, 900)
BUFFERS = (1, 4, 16)
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def trajectories() -> tuple[Floats, Ints]:
    """Label and system of every frame, one trajectory after the other."""
    generator = np.random.default_rng(0)
    system = np.repeat(np.arange(SYSTEMS), FRAMES)
    label = generator.normal(0, np.sqrt(BETWEEN), SYSTEMS)[system]
    return label + generator.normal(0, np.sqrt(1 - BETWEEN), len(system)), system


def batches(count: int, block: int, buffer: int) -> Iterator[Ints]:
    """Batches of all epochs, of a split with blocks of ``block`` samples."""
    starts = range(0, count, block)
    blocks = [range(start, min(start + block, count)) for start in starts]
    ones = np.ones(count, np.int64)
    rule = SamplerConfig(0, BATCH_SIZE, shuffle_blocks=buffer)
    for epoch in range(EPOCHS):
        yield from epoch_batches(blocks, ones, rule, epoch, 0)


def spread(label: Floats, system: Ints, block: int, buffer: int) -> tuple[float, float]:
    """Variance of batch means, and samples whose system is in the batch already."""
    means, repeats = [], []
    for batch in batches(len(label), block, buffer):
        means.append(label[batch].mean())
        repeats.append(len(batch) - len(np.unique(system[batch])))
    return float(np.var(means)), float(np.mean(repeats))


@click.group()
def main() -> None:
    """Compare block shuffles with full ones."""


@main.command()
def order() -> None:
    """Variance of batch means ÷ that of a full shuffle, and repeated systems."""
    label, system = trajectories()
    permuted = storage_order(len(label), 0)
    count = len(label)
    # Of the mean of a batch drawn without replacement from all samples.
    full = label.var() / BATCH_SIZE * (count - BATCH_SIZE) / (count - 1)
    click.echo(
        f"{'order':10} {'block':>6} {'buffer':>7} {'variance':>9} {'repeats':>8}"
    )
    for block, buffer in itertools.product(BLOCKS, BUFFERS):
        for name, index in (("natural", slice(None)), ("permuted", permuted)):
            variance, same = spread(label[index], system[index], block, buffer)
            ratio = variance / full
            click.echo(f"{name:10} {block:6} {buffer:7} {ratio:9.3f} {same:8.3f}")
    variance, same = spread(label, system, count, 1)
    click.echo(f"{'full':10} {'':6} {'':7} {variance / full:9.3f} {same:8.3f}")


@main.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--config", type=click.Path(path_type=Path), help="Of the student.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/shuffle"))
@click.option("--student", default="painn-small-demo", show_default=True)
@click.option("--steps", default=600, show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--buffers", default="1,16", show_default=True)
def train(
    store: Path,
    config: Path | None,
    out: Path,
    student: str,
    steps: int,
    seeds: str,
    buffers: str,
) -> None:
    """Validation errors of one student under different shuffles."""
    torch.set_num_threads(1)
    opened = FeatureStore.open(store)
    split = opened.splits["train"]
    click.echo(f"{len(split)} samples in {split.n_blocks} blocks, {steps} steps")
    choices = {f"buffer {number}": int(number) for number in buffers.split(",")}
    choices["full"] = split.n_blocks
    curves: dict[str, list[list[dict[str, float]]]] = {name: [] for name in choices}
    for seed, (name, buffer) in itertools.product(seeds.split(","), choices.items()):
        flags = {"student.preset": student, "steps": steps, "seed": int(seed)}
        flags |= {"shuffle_blocks": buffer, "eval_every": steps // 4}
        chosen = load_config(config, flags, ())
        folder = out / f"buffer{buffer}-s{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        run = Trainer(chosen, opened, folder, torch.device("cpu"))
        run.train(resume=False)
        curves[name].append(run.rows)
        last = {key: run.rows[-1][key] for key in ("val_energy_mae", "val_forces_mae")}
        click.echo(f"{name} seed {seed}: {json.dumps(last)}", err=True)
    columns = {"val_energy_mae": "energy MAE [meV]", "val_forces_mae": "forces [meV/Å]"}
    for column, title in columns.items():
        click.echo(title)
        for name, runs in curves.items():
            cells = [
                _cell([row[column] for row in rows]) for rows in zip(*runs, strict=True)
            ]
            click.echo(f"  {name:12} " + "  ".join(cells))
    rows = next(iter(curves.values()))[0]
    click.echo("at steps " + ", ".join(str(row["step"]) for row in rows))


def _cell(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):6.1f} ± {spread:4.1f}"


if __name__ == "__main__":
    main()
