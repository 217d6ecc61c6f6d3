"""Time of a KD step from the cache ÷ a plain step of the same student, in one run.

    python benchmarks/kd_step.py STORE --student painn-small --teacher FILE

Plain and distilled students take turns on the same batches, so that whatever else the
machine does hits all. A step is everything between two batches: reading the store,
graphs (memorised after their first use, as in training), forward, backward, optimiser,
moving average. The teacher's own forward pass over the same batch is timed beside it:
what a step would cost on top with the teacher in the loop.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch

from kd_train.config.train_config import load_config
from kd_train.loader.choose_split import stored_widths
from kd_train.loader.data import CachedSamples
from kd_train.strategies import load_strategy
from kd_train.trainer.trainer import Trainer
from pipeline.models.checkpoint import load_checkpoint
from pipeline.store.reader import FeatureStore

STRATEGIES = (
    "none",
    "n2n",
    "e2n",
    "v2v",
    "vanilla1",
    "vanilla2",
    "n2n+v2v",
    "jacobian",
)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--student", default="painn-small", show_default=True)
@click.option("--teacher", type=click.Path(path_type=Path), help="Teacher checkpoint.")
@click.option("--batch-size", default=32, show_default=True)
@click.option("--rounds", default=40, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(
    store: Path,
    student: str,
    teacher: Path | None,
    batch_size: int,
    rounds: int,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    opened = FeatureStore.open(store)
    flags = {"student.preset": student, "batch_size": batch_size}
    stored = stored_widths(opened.splits["train"])
    strategies = [
        name
        for name in STRATEGIES
        if all(
            field in stored
            for part in name.split("+")
            if part != "none"
            for field in load_strategy(part).fields
        )
    ]
    runs: dict[str, Trainer] = {}
    for name in strategies:
        config = load_config(
            None, {**flags, "strategy": name, "val_split": "train"}, ()
        )
        runs[name] = Trainer(config, opened, Path("unused"), torch.device("cpu"))
    network = live = None
    if teacher is not None:
        network = load_checkpoint(teacher).model
        live = CachedSamples(
            opened.splits["train"], network.graph_rule, network.elements
        )
    generator = np.random.default_rng(0)
    count = len(opened.splits["train"])
    batches = [generator.integers(0, count, batch_size) for _ in range(8)]
    times: dict[str, list[float]] = {name: [] for name in (*strategies, "teacher")}
    for number in range(-len(batches), rounds):  # the first pass fills the caches
        positions = batches[number % len(batches)]
        for name, run in runs.items():
            samples = run.train_samples
            spent = seconds(
                lambda r=run, s=samples, p=positions: r.step(r.on_device(s.batch(p)))
            )
            if number >= 0:
                times[name].append(spent)
        if network is not None and live is not None:
            # Its graphs are memorised like the student's.
            with torch.no_grad():
                spent = seconds(lambda p=positions: network(live.batch(p)))
            if number >= 0:
                times["teacher"].append(spent)
    plain = times["none"]
    click.echo(
        f"{student}, batches of {batch_size}, {threads} thread(s), {rounds} rounds"
    )
    click.echo(f"{'strategy':12} {'ms, median':>10} {'÷ plain':>8}")
    for name, spent in times.items():
        if not spent:
            continue
        ratio = statistics.median(a / b for a, b in zip(spent, plain, strict=True))
        label = "+ live" if name == "teacher" else name
        click.echo(f"{label:12} {1e3 * statistics.median(spent):10.1f} {ratio:8.3f}")


if __name__ == "__main__":
    main()
