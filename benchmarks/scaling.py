"""What a second worker is worth: one build with one and with two, turn by turn.

    python benchmarks/scaling.py cache_specs/demo.yaml --set splits.test=null

Real teacher, real data. Each run is `kd-cache build` in a process of its own with
``--workers``, every worker with the same number of threads (``--threads``, one by
default, so that two workers take two cores and one takes one). The rate is that of the
blocks in the middle of a run, while every worker has its two in hand: planning,
starting and the last blocks, at which workers have nothing more to do, are left out.
Runs alternate, and every store must have the same bytes. To be run while nothing else
is.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import click

_PROGRAM = "from pipeline.cli.main import main; main()"


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True)
@click.option("--workers", "counts", multiple=True, type=int, default=(1, 2))
@click.option("--threads", default=1, show_default=True, help="Of every worker.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--rows", default=1024, show_default=True, help="Atoms of a block.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to work.")
def main(
    spec: Path,
    overrides: tuple[str, ...],
    counts: tuple[int, ...],
    threads: int,
    repeats: int,
    rows: int,
    folder: Path | None,
) -> None:
    changes = (*overrides, f"store.rows_per_block={rows}")
    rates: dict[int, list[float]] = {count: [] for count in counts}
    whole: dict[int, list[float]] = {count: [] for count in counts}
    digests = set()
    samples = blocks = 0
    for turn in range(repeats):
        for count in counts if turn % 2 == 0 else reversed(counts):
            with tempfile.TemporaryDirectory(dir=folder) as made:
                store = Path(made) / "s.zarr"
                begin = time.perf_counter()
                _build(spec, store, changes, count, threads)
                whole[count].append(time.perf_counter() - begin)
                told = json.loads(store.with_name("s.zarr.status.json").read_text())
                samples, blocks = told["samples_total"], told["blocks_total"]
                log = store.with_name("s.zarr.log").read_text()
                rates[count].append(_rate(log, 2 * max(1, count), samples / blocks))
                digests.add(_digest(store))
            click.echo(f"{count} workers: {rates[count][-1]:.1f} samples/s", err=True)
    click.echo(f"{samples} samples in {blocks} blocks, {threads} thread(s) a worker")
    click.echo(f"{'workers':>8}{'samples/s':>11}{'speedup':>9}{'whole s':>9}")
    base = statistics.median(rates[counts[0]])
    for count in counts:
        rate = statistics.median(rates[count])
        run = statistics.median(whole[count])
        click.echo(f"{count:>8}{rate:>11.1f}{rate / base:>9.2f}{run:>9.1f}")
    click.echo(f"all {repeats * len(counts)} stores equal: {len(digests) == 1}")
    if len(digests) > 1:
        sys.exit(1)


def _build(
    spec: Path, store: Path, changes: tuple[str, ...], workers: int, threads: int
) -> None:
    command = ["build", spec, "--out", store, "--workers", workers]
    command += ["--threads", threads, "--device", "cpu"]
    for change in changes:
        command += ["--set", change]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode:
        sys.exit(done.stderr)


def _rate(log: str, flying: int, samples: float) -> float:
    """Samples per second between the first and the last ``flying`` blocks of a log."""
    ends = [
        datetime.fromisoformat(line.partition(" INFO ")[0].replace(",", "."))
        for line in log.splitlines()
        if " written, " in line
    ]
    if len(ends) <= 2 * flying:
        sys.exit(f"{len(ends)} blocks are too few; take more samples or fewer --rows")
    middle = ends[flying - 1 : len(ends) - flying]
    return samples * (len(middle) - 1) / (middle[-1] - middle[0]).total_seconds()


def _digest(store: Path) -> str:
    """Hash over all files but the root, which says where the store lies."""
    digest = hashlib.sha256()
    for file in sorted(store.rglob("*")):
        name = str(file.relative_to(store))
        if file.is_file() and name not in ("zarr.json", "digests/c/0"):
            digest.update(name.encode() + file.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
