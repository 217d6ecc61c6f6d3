"""Several small students on one device: a process each ÷ one process for all.

    python benchmarks/sharing.py caches/demo.zarr --students 2 --steps 200 \
        --config cache_specs/demo/student.yaml --student painn-small-demo

(a) N processes at the same time, each with one student, its own batches made ahead and
``--threads`` CPU threads. (b) One process with N times as many threads (or
``--shared-threads``), in which N students take turns on the same batch. All take the
same steps. Processes are started, take some steps to warm up and wait; only what
follows is timed. Rounds of (a) and (b) alternate, and ratios are taken within a round.
Memory is the peak of all processes of a round together.
"""

import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import click
import torch

from kd_train.config.train_config import load_config
from kd_train.loader.prefetch import prefetch
from kd_train.loader.sampler import SamplerConfig, training_batches
from kd_train.trainer.trainer import Trainer
from pipeline.parallel.device_choice import choose_device
from pipeline.store.reader import FeatureStore

WARMUP = 10


def worker(
    store: str,
    config: Path,
    student: str,
    strategy: str,
    seeds: Sequence[int],
    steps: int,
    device: str | None,
) -> None:
    """Train a student for every seed on common batches; wait once they are warm."""
    place, opened = choose_device(device), FeatureStore.open(store)
    runs = []
    for seed in seeds:
        flags = {"student.preset": student, "strategy": strategy, "seed": seed}
        chosen = load_config(config, flags, [f"steps={steps + WARMUP}"])
        runs.append(Trainer(chosen, opened, Path("unused"), place))
    first = runs[0]
    samples, split = first.train_samples, first.train_samples.split
    blocks = [split.block_positions(block) for block in range(split.n_blocks)]
    rule = SamplerConfig(seeds[0], first.config.batch_size, first.config.batch_atoms)
    draws = itertools.islice(
        training_batches(blocks, split.n_atoms, rule), steps + WARMUP
    )
    threads = first.config.loader_threads
    stream = prefetch(
        lambda draw: samples.batch(draw.positions), draws, threads=threads
    )
    with closing(stream) as batches:
        for number, batch in enumerate(batches):
            if number == WARMUP:
                print("ready", flush=True)
                sys.stdin.readline()
            batch = first.on_device(batch)
            for run in runs:
                run.step(batch)
                run.progress.step += 1
    if place.type == "cuda":
        torch.cuda.synchronize(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"peak": peak}), flush=True)


def timed(commands: Sequence[list[str]]) -> tuple[float, float]:
    """Seconds from a common start to the last end, and GiB of all together."""
    processes = [
        subprocess.Popen(c, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for c in commands
    ]
    for process in processes:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise click.ClickException("A process ended before it was ready.")
    started = time.perf_counter()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    peaks = []
    for process in processes:
        assert process.stdout is not None
        peaks.append(json.loads(process.stdout.readline())["peak"])
    spent = time.perf_counter() - started
    for process in processes:
        process.communicate()
    return spent, sum(peaks)


@click.command()
@click.argument("store")
@click.option("--config", required=True, type=click.Path(path_type=Path))
@click.option("--student", default="painn-small-demo", show_default=True)
@click.option("--strategy", default="v2v+vanilla2", show_default=True)
@click.option("--students", "count", default=2, show_default=True)
@click.option("--steps", default=200, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=1, show_default=True, help="Of a process of (a).")
@click.option("--shared-threads", type=int, help="Of (b); default: as all of (a).")
@click.option("--device")
@click.option("--worker", "seeds", hidden=True)
def main(
    store: str,
    config: Path,
    student: str,
    strategy: str,
    count: int,
    steps: int,
    rounds: int,
    threads: int,
    shared_threads: int | None,
    device: str | None,
    seeds: str | None,
) -> None:
    if seeds is not None:
        torch.set_num_threads(threads)
        numbers = [int(seed) for seed in seeds.split(",")]
        worker(store, config, student, strategy, numbers, steps, device)
        return
    command = [sys.executable, __file__, store, "--config", str(config)]
    command += ["--student", student, "--strategy", strategy, "--steps", str(steps)]
    if device is not None:
        command += ["--device", device]
    several = [
        [*command, "--threads", str(threads), "--worker", str(n)] for n in range(count)
    ]
    seeds = ",".join(map(str, range(count)))
    together = threads * count if shared_threads is None else shared_threads
    one = [[*command, "--threads", str(together), "--worker", seeds]]
    found = [(timed(several), timed(one)) for _ in range(rounds)]
    click.echo(f"{count} {student}, {strategy}, {steps} steps each, {rounds} rounds")
    for name, number in (("a process each", 0), ("one process", 1)):
        rates = [count * steps / pair[number][0] for pair in found]
        memory = statistics.median(pair[number][1] for pair in found)
        click.echo(
            f"{name:15} {statistics.median(rates):8.1f} steps/s  {memory:5.2f} GiB"
        )
    ratios = [apart[0] / shared[0] for apart, shared in found]
    click.echo(
        f"time of a process each ÷ one process: {statistics.median(ratios):.3f} "
        f"(rounds: {', '.join(f'{ratio:.3f}' for ratio in sorted(ratios))})"
    )


if __name__ == "__main__":
    main()
