"""``kd-train`` and ``kd-report``. Heavy imports happen inside the commands."""

import os
from datetime import datetime
from pathlib import Path

import click

from kd_train.config import STRATEGIES, load_config
from pipeline.commands import chosen_device, log_to_file, one_sentence_errors
from pipeline.errors import SpecError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--cache", required=True, help="Store: a folder, zip archive or URL.")
@click.option(
    "--stage",
    type=click.Path(path_type=Path),
    help="Local folder to copy the store to first, once, and to train from.",
)
@click.option(
    "--strategy",
    help=f"{', '.join(STRATEGIES)}, or several joined with +. Default: none.",
)
@click.option("--student", help="painn-small, painn-big, schnet, ...; see the README.")
@click.option("--config", type=click.Path(path_type=Path), help="YAML configuration.")
@click.option("--set", "overrides", multiple=True, help="a.b=value in the config.")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder.")
@click.option("--resume", is_flag=True, help="Continue the run in --out.")
@click.option("--auto-resume", is_flag=True, help="Like --resume if there is a run.")
@click.option("--seed", type=int, help="Of initial weights and sample order.")
@click.option("--steps", type=int, help="Optimiser steps.")
@click.option("--device", help="cpu, cuda, cuda:1; default: a GPU if any.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of torch.")
@one_sentence_errors
def main(
    cache: str,
    stage: Path | None,
    strategy: str | None,
    student: str | None,
    config: Path | None,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: bool,
    auto_resume: bool,
    seed: int | None,
    steps: int | None,
    device: str | None,
    threads: int | None,
) -> None:
    """Train a student against the store of teacher features at CACHE."""
    _require_one_process()
    flags = {
        "strategy": strategy,
        "student.preset": student,
        "seed": seed,
        "steps": steps,
    }
    chosen = load_config(config, flags, overrides)

    import torch

    from kd_train.loop import Run
    from kd_train.setup import with_student
    from pipeline.store.reader import FeatureStore

    if threads is not None:
        torch.set_num_threads(threads)
    place = chosen_device(device)
    if stage is not None:
        from pipeline.store.transfer import staged_store

        cache = str(staged_store(cache, stage))
    store = FeatureStore.open(cache)
    chosen = with_student(chosen, store)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{chosen.student.preset}-{chosen.strategy}-s{chosen.seed}-{stamp}"
    folder = out or Path("runs") / name
    started = (folder / "last.pt").exists()
    resume = resume or (auto_resume and started)
    if started and not resume:
        raise SpecError(f"{folder} holds a run; add --resume or change --out.")
    run = Run(chosen, store, folder, place)
    folder.mkdir(parents=True, exist_ok=True)
    log_to_file("kd_train", folder / "train.log")
    summary = run.train(resume=resume)
    metrics = ", ".join(
        f"{k} {v:.4g}" for k, v in summary["metrics"].items() if v is not None
    )
    click.echo(f"{folder}: {metrics}")


def _require_one_process() -> None:
    """Refuse to be one of several copies that would train the same thing."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise SpecError(
            f"kd-train works in one process and was started as one of {processes} "
            "(WORLD_SIZE); start it without torchrun."
        )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder.")
@one_sentence_errors
def report_main(runs: tuple[Path, ...], out: Path) -> None:
    """Compare finished RUNS: gap-closed table, learning curves, parity plots."""
    from kd_train.report import write_report

    click.echo(write_report(list(runs), out))
