"""Students × strategies × seeds on one store, a few processes at a time, one report.

    python benchmarks/compare.py STORE OUT --student painn-small-demo --seeds 0,1,2 \
        --config cache_specs/demo/student.yaml

Finished runs are kept and interrupted ones continued, so it may be killed and repeated.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import click

STRATEGIES = "none,n2n,v2v,vanilla1,vanilla2"


def train(folder: Path, arguments: list[str]) -> str | None:
    """Run one training to its end; the message of a failure, None when all is well."""
    if (folder / "metrics.json").exists():
        return None
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = ["kd-train", "--out", str(folder), "--auto-resume", *arguments]
    log = folder.with_suffix(".log")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as stream:
        done = subprocess.run(command, stderr=stream, stdout=stream, env=environment)
    return None if done.returncode == 0 else f"{folder} failed, see {log}"


@click.command()
@click.argument("store", type=click.Path(exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--student", "students", multiple=True, default=["painn-small-demo"])
@click.option("--strategies", default=STRATEGIES, show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--config", required=True, type=click.Path(exists=True))
@click.option("--set", "overrides", multiple=True)
@click.option("--jobs", default=2, show_default=True)
def main(
    store: str,
    out: Path,
    students: tuple[str, ...],
    strategies: str,
    seeds: str,
    config: str,
    overrides: tuple[str, ...],
    jobs: int,
) -> None:
    runs = {}
    for seed, student, strategy in product(
        seeds.split(","), students, strategies.split(",")
    ):
        if student.startswith("schnet") and "v2v" in strategy:
            continue  # SchNet has no vectors
        arguments = ["--cache", store, "--student", student, "--strategy", strategy]
        arguments += ["--seed", seed, "--config", config, "--threads", "1"]
        arguments += [part for change in overrides for part in ("--set", change)]
        runs[out / f"{student}-{strategy}-s{seed}"] = arguments
    with ThreadPoolExecutor(jobs) as pool:
        failures = [f for f in pool.map(train, runs, runs.values()) if f is not None]
    finished = [str(run) for run in runs if (run / "metrics.json").exists()]
    subprocess.run(["kd-report", *finished, "--out", str(out / "report")], check=True)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
