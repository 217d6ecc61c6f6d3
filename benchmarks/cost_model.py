"""What a store of OC20 costs: hours, terabytes, files and memory for N GPUs.

    python benchmarks/cost_model.py                  # constants, then the projection
    python benchmarks/cost_model.py --set teacher_rate=140 --set row_bytes=2366

Nothing is measured here: every constant is a line of the first table with the place it
comes from, and can be set. docs/scaling.md shows what is printed.
"""

from dataclasses import dataclass
from math import ceil

import click

DATASETS = {"OC20-2M": 2.0e6, "OC20-All": 134.0e6}
HOUR = 3600.0


@dataclass(frozen=True)
class Constant:
    """A number that the projection is made from."""

    value: float
    unit: str
    source: str


CONSTANTS = {
    "atoms": Constant(73.0, "atoms a sample", "OC20-2M: 146 M atoms, 2 M frames"),
    "row_bytes": Constant(
        4664.0, "bytes an atom", "measurements/benchmarks.md, gemnet_oc20 with float16"
    ),
    "teacher_rate": Constant(
        76.0, "samples/s, one GPU", "the paper, GemNet-OC on its GPU"
    ),
    "overhead": Constant(
        1.04, "× teacher's time", "measurements/benchmarks.md: 1.01 to 1.04 on a CPU"
    ),
    "plan_ms": Constant(0.6, "core ms a sample", "measurements/scaling.md, OC20 LMDB"),
    "seal_gb": Constant(3.9, "GB/s a core", "hashing, measurements/scaling.md"),
    "verify_gb": Constant(
        0.45, "GB/s a core", "decoding and checks, measurements/scaling.md"
    ),
    "pass_processes": Constant(
        1.0, "processes", "a choice: that plan, seal and verify (pass_workers)"
    ),
    "disk_gb": Constant(1.0, "GB/s read", "one disk; a parallel file system has more"),
    "write_mb": Constant(
        318.0,
        "MB/s, one job",
        "measurements/store_benchmarks.md, 40 000 samples, synced",
    ),
    "block_rows": Constant(131072.0, "atoms a block", "cache_specs/gemnet_oc20.yaml"),
    "block_files": Constant(
        15.0, "files a block", "14 arrays of gemnet_oc20 and a commit record"
    ),
    "index_bytes": Constant(
        58.0,
        "bytes a sample",
        "measurements/store_benchmarks.md, reader's index in memory",
    ),
    "job_bytes": Constant(
        280.0,
        "bytes a sample",
        "measurements/scaling.md: own memory of planning and filling",
    ),
    "blocks_in_memory": Constant(2.0, "blocks", "pipeline/build/fill.py, on a GPU"),
    "program_gb": Constant(
        1.5, "GB", "a guess: Python, torch, CUDA's host side, weights"
    ),
}


def projection(
    samples: float, gpus: int, of: dict[str, float]
) -> list[tuple[str, str]]:
    """Lines of the projection of ``samples`` on ``gpus`` with the constants ``of``."""
    rows = samples * of["atoms"]
    size = rows * of["row_bytes"]
    blocks = ceil(rows / of["block_rows"])
    fill = samples / of["teacher_rate"] * of["overhead"] / gpus
    plan = samples * of["plan_ms"] / 1e3 / of["pass_processes"]
    seal, verify = (
        size / (min(of["disk_gb"], of[rate] * of["pass_processes"]) * 1e9)
        for rate in ("seal_gb", "verify_gb")
    )
    stream = gpus * of["teacher_rate"] / of["overhead"] * of["atoms"] * of["row_bytes"]
    index = samples * of["index_bytes"]
    block = of["block_rows"] * of["row_bytes"]
    job = (
        of["program_gb"] * 1e9
        + of["blocks_in_memory"] * block
        + samples * of["job_bytes"]
    ) / 1e9
    return [
        ("planning, h", _short(plan / HOUR)),
        ("filling, h", _short(fill / HOUR)),
        ("sealing, h", _short(seal / HOUR)),
        ("verifying, h", _short(verify / HOUR)),
        ("all, h", _short((plan + fill + seal + verify) / HOUR)),
        ("GPU hours", _short(fill * gpus / HOUR)),
        ("store, TB", _short(size / 1e12)),
        ("blocks", f"{blocks:,}"),
        ("files", f"{round(blocks * of['block_files']):,}"),
        ("blocks a job, jobs = GPUs", _short(blocks / gpus)),
        ("written by all jobs, MB/s", _short(stream / 1e6)),
        (
            "of what a job could write",
            f"{stream / gpus / of['write_mb'] / 1e4:.0f} %",
        ),
        ("RAM of a job, GB", _short(job)),
        ("RAM of a reader's index, GB", _short(index / 1e9)),
    ]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _changed(texts: tuple[str, ...]) -> dict[str, float]:
    values = {name: constant.value for name, constant in CONSTANTS.items()}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in values:
            known = ", ".join(values)
            raise click.BadParameter(f"{name!r} is no constant; there are {known}.")
        values[name] = float(number)
    return values


@click.command()
@click.option("--set", "changes", multiple=True, help="NAME=NUMBER of the first table.")
@click.option("--gpus", multiple=True, type=click.IntRange(1), default=(1, 8, 64))
def main(changes: tuple[str, ...], gpus: tuple[int, ...]) -> None:
    """Print the constants and what follows from them."""
    values = _changed(changes)
    for name, constant in CONSTANTS.items():
        mine = values[name]
        source = constant.source if mine == constant.value else "--set"
        click.echo(f"{name:16} {mine:10g}  {constant.unit:18}  {source}")
    for dataset, samples in DATASETS.items():
        click.echo(f"\n{dataset}: {samples / 1e6:g} million samples")
        columns = [projection(samples, count, values) for count in gpus]
        heads = "".join(f"{f'{count} GPU':>12}" for count in gpus)
        click.echo(f"{'':34}{heads}")
        for row in zip(*columns, strict=True):
            cells = "".join(f"{cell:>12}" for _, cell in row)
            click.echo(f"{row[0][0]:34}{cells}")


if __name__ == "__main__":
    main()
