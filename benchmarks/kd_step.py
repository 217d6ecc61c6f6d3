"""Time of a KD step from the cache ÷ a plain step of the same student, in one run.

    python benchmarks/kd_step.py STORE --student painn-small --teacher FILE

Plain and distilled students take turns on the same batches, so that whatever else the
machine does hits all. A step is everything between two batches: reading the store,
graphs (memorised after their first use, as in training), forward, backward, optimiser,
moving average. The teacher's own forward pass over the same batch is timed beside it:
what a step would cost on top with the teacher in the loop.

    python benchmarks/kd_step.py STORE --variants [--against CHECKOUT ...]

compares torch operations, native kernels and other checkouts instead. Every variant is
a process and takes the same steps, in turn; CPU seconds of all its threads count.
"""

import os
import statistics
import subprocess
import sys
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

STRATEGIES = ("none", "n2n", "e2n", "v2v", "vanilla1", "vanilla2", "n2n+v2v", "jacobian")


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Variant:
    """A process that takes steps on request, and what they took."""

    def __init__(self, checkout: Path, arguments: list[str]) -> None:
        worker = Path(__file__).with_name("kd_step_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, str(worker), *arguments],
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.reads: list[float] = []
        self.steps: list[float] = []
        self.losses: list[float] = []

    def step(self, noted: bool) -> None:
        """Take a step and note its CPU seconds and loss."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        read, step, loss = map(float, self._process.stdout.readline().split())
        if noted:
            self.reads.append(read)
            self.steps.append(step)
        self.losses.append(loss)

    def end(self) -> None:
        """Let the process end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare_variants(
    arguments: list[str], checkouts: tuple[Path, ...], rounds: int, warm_up: int = 8
) -> None:
    """Print CPU time and losses of all variants."""
    own = Path(__file__).resolve().parents[1]
    variants = {str(path): Variant(path, arguments) for path in checkouts}
    variants["torch"] = Variant(own, arguments)
    variants["native"] = Variant(own, [*arguments, "native_kernels=true"])
    for number in range(-warm_up, rounds):
        for variant in variants.values():
            variant.step(noted=number >= 0)
    for variant in variants.values():
        variant.end()
    first = next(iter(variants.values()))
    click.echo(f"{'variant':24} {'read':>7} {'step':>7} {'÷ first':>8} {'loss':>9}")
    for name, one in variants.items():
        steps = [statistics.median(v.steps) for v in (one, first)]
        ratio = statistics.median(
            a / b for a, b in zip(one.steps, first.steps, strict=True)
        )
        apart = max(
            abs(a / b - 1) for a, b in zip(one.losses, first.losses, strict=True)
        )
        read = 1e3 * statistics.median(one.reads)
        click.echo(
            f"{name[-24:]:24} {read:7.2f} {1e3 * steps[0]:7.2f} {ratio:8.3f} {apart:9.1e}"
        )


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--student", default="painn-small", show_default=True)
@click.option("--teacher", type=click.Path(path_type=Path), help="Teacher checkpoint.")
@click.option("--batch-size", default=32, show_default=True)
@click.option("--rounds", default=40, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--variants", is_flag=True, help="Compare torch and native kernels.")
@click.option("--strategy", default="none", help="Strategy of the variants.")
@click.option("--against", type=click.Path(path_type=Path), multiple=True)
def main(
    store: Path,
    student: str,
    teacher: Path | None,
    batch_size: int,
    rounds: int,
    threads: int,
    variants: bool,
    strategy: str,
    against: tuple[Path, ...],
) -> None:
    if variants or against:
        counts = (str(batch_size), str(threads))
        compare_variants([str(store), student, strategy, *counts], against, rounds)
        return
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
