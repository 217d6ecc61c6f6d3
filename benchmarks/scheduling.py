"""The scheduling of a large build, simulated: 1 000 blocks on 64 workers.

    python benchmarks/scheduling.py
    python benchmarks/scheduling.py --blocks 200 --workers 16 --seconds 0.5
    python benchmarks/scheduling.py --log caches/demo.zarr.log

Real are the engine (``pipeline.parallel.task_pool``), the Dask scheduler and its 64
workers, which are threads of this process, and the store: every block is claimed,
written, committed and checked as in a build. A stub stands for the teacher: it sleeps
as long as a block takes: times drawn from those between the blocks of a real build,
which its log tells (``--log``), scaled to a median of ``--seconds``; without a log they
are log-normal. Tries are those of the command. One run each
without trouble, with 5 % of tries failing, with a worker dying at 1 % of tries, and
with both. Exit code 1 when a block was lost, was written twice or is damaged.
"""

import heapq
import json
import logging
import re
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import dask
import numpy as np
import scheduling_stub as stub

from pipeline.build.fill import awaited_errors, transient_errors
from pipeline.parallel.task_pool import DaskPool, run_tasks

_KIB = 1024
_WRITTEN = re.compile(r"block \d+ of .* written")


@dataclass
class Row:
    """One simulated build, as a line of the table.

    ``ideal`` is what a scheduler that costs nothing needs for the same blocks on the
    same workers without trouble; ``cpu_ms`` is all processor time of this process per
    block: engine, scheduler, 64 workers, claims, writes and commits together.
    """

    trouble: str
    ideal: float
    seconds: float
    cpu_ms: float
    grown_mib: float
    tries: int
    failures: int
    deaths: int
    given_up: int
    found_done: int
    lost: int
    twice: int

    @property
    def efficiency(self) -> float:
        """Share of the workers' time that went into blocks."""
        return self.ideal / self.seconds


@click.command()
@click.option("--blocks", default=1000, show_default=True)
@click.option("--workers", default=64, show_default=True)
@click.option("--seconds", default=2.0, show_default=True, help="Median of a block.")
@click.option("--spread", default=0.1, show_default=True, help="Of its logarithm.")
@click.option("--log", type=click.Path(exists=True, path_type=Path), help="Of a build.")
@click.option("--failing", default=0.05, show_default=True, help="Share of tries.")
@click.option("--dying", default=0.01, show_default=True, help="Share of tries.")
@click.option("--seed", default=0, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to work.")
@click.option("--only", type=click.Choice(["none", "failing", "dying", "both"]))
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def main(
    blocks: int,
    workers: int,
    seconds: float,
    spread: float,
    log: Path | None,
    failing: float,
    dying: float,
    seed: int,
    folder: Path | None,
    only: str | None,
    as_json: bool,
) -> None:
    generator = np.random.default_rng(seed)
    if log is None:
        times = generator.lognormal(np.log(seconds), spread, blocks)
    else:
        measured = block_times(log)
        times = generator.choice(measured, blocks) * (seconds / np.median(measured))
        click.echo(f"{len(measured)} block times of {log.name}", err=True)
    cases = {
        "none": (0.0, 0.0),
        "failing": (failing, 0.0),
        "dying": (0.0, dying),
        "both": (failing, dying),
    }
    if only is not None:
        cases = {only: cases[only]}
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as made:
        for name, chances in cases.items():
            store = Path(made) / f"{len(rows)}.zarr"
            rows.append(simulate(name, times.tolist(), workers, chances, seed, store))
            click.echo(f"{name}: {rows[-1].seconds:.1f} s", err=True)
    if as_json:
        click.echo(json.dumps([asdict(r) | {"efficiency": r.efficiency} for r in rows]))
    else:
        _print(rows)
    if any(row.lost or row.twice or row.given_up for row in rows):
        sys.exit(1)


def block_times(log: Path) -> np.ndarray:
    """Seconds between blocks that one process wrote, from the log of its build."""
    lines = [line for line in log.read_text().splitlines() if _WRITTEN.search(line)]
    told = [datetime.fromisoformat(line[:23].replace(",", ".")) for line in lines]
    seconds = np.array([(b - a).total_seconds() for a, b in pairwise(told)])
    if not seconds.size:
        raise click.BadParameter(f"{log} tells of fewer than two blocks.")
    return seconds


def simulate(
    name: str,
    times: list[float],
    workers: int,
    chances: tuple[float, float],
    seed: int,
    store: Path,
) -> Row:
    """Fill a store of ``len(times)`` blocks; fails where a block is damaged."""
    writer = stub.make_store(store, len(times))
    scene = stub.Scene(writer, times, *chances, seed)
    stub.current.append(scene)
    failed = []
    ended = []
    with _cluster(workers) as client:
        pool = DaskPool(client)
        before, cpu, begin = _peak(), time.process_time(), time.perf_counter()
        for outcome in run_tasks(
            pool,
            stub.fill,
            range(len(times)),
            transient=transient_errors(pool),
            awaited=awaited_errors(pool),
        ):
            ended.append(outcome.item)
            if outcome.error is not None:
                failed.append(outcome.item)
        took = time.perf_counter() - begin
        cpu = time.process_time() - cpu
        grown = _peak() - before
    # Threads of workers that died may still be at a block.
    for block in range(len(times)):
        _wait_for(writer, block)
    lost = set(range(len(times))) - set(ended) | set(writer.pending_blocks(stub.SPLIT))
    if not lost:
        writer.seal()
    return Row(
        trouble=name,
        ideal=_greedy(times, workers),
        seconds=took,
        cpu_ms=1e3 * cpu / len(times),
        grown_mib=grown / _KIB,
        tries=sum(scene.tries.values()),
        failures=scene.failures,
        deaths=scene.deaths,
        given_up=len(failed),
        found_done=scene.found_done,
        lost=len(lost),
        twice=sum(n > 1 for n in scene.writes.values()) + len(ended) - len(set(ended)),
    )


def _wait_for(writer: Any, block: int) -> None:
    from pipeline.errors import BusyError

    while True:
        try:
            with writer.claim_block(stub.SPLIT, block):
                return
        except BusyError:
            time.sleep(0.05)


@contextmanager
def _cluster(workers: int) -> Iterator[Any]:
    """Client of ``workers`` workers, each replaced soon after it died."""
    from distributed import Client, LocalCluster

    for logger in ("distributed", "tornado.application", "asyncio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    over = threading.Event()
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "500ms"}),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=False,
            memory_limit=0,
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
            scheduler_kwargs={"allowed_failures": 0},
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):

        def replace() -> None:
            while not over.wait(1.0):
                cluster.scale(workers)

        thread = threading.Thread(target=replace, daemon=True)
        thread.start()
        try:
            yield client
        finally:
            over.set()
            thread.join()


def _greedy(times: list[float], workers: int) -> float:
    """Seconds until the last block when each goes to the first free worker at once."""
    free = [0.0] * workers
    for seconds in times:
        heapq.heappush(free, heapq.heappop(free) + seconds)
    return max(free)


def _peak() -> int:
    """Largest resident memory of this process so far, KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _print(rows: list[Row]) -> None:
    line = "{:<12}{:>9}{:>9}{:>12}{:>15}{:>10}" + "{:>9}" * 7
    names = ("ideal s", "real s", "efficiency", "CPU ms/block", "grown MiB")
    counts = ("tries", "failed", "deaths", "given up", "found", "lost", "twice")
    click.echo(line.format("trouble", *names, *counts))
    for r in rows:
        click.echo(
            line.format(
                r.trouble,
                f"{r.ideal:.1f}",
                f"{r.seconds:.1f}",
                f"{r.efficiency:.3f}",
                f"{r.cpu_ms:.1f}",
                f"{r.grown_mib:.0f}",
                *(r.tries, r.failures, r.deaths, r.given_up),
                *(r.found_done, r.lost, r.twice),
            )
        )


if __name__ == "__main__":
    main()
