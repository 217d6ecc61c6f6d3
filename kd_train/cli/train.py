"""``kd-train`` and ``kd-report``. Heavy imports happen inside the commands."""

import logging
import os
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import click

from kd_train.config.strategy_names import STRATEGIES
from kd_train.config.train_config import TrainConfig, load_config
from kd_train.distributed import World, process_device, process_group, read_world
from pipeline.console import PATH, PLACE, THREADS, one_sentence_errors
from pipeline.errors import SpecError
from pipeline.files.atomic import hold_lock
from pipeline.logs import log_to_file, propagate_warnings
from pipeline.parallel.device_choice import choose_device


class _ResumeOptions(NamedTuple):
    """Whether a run that is in the folder goes on, and whether with more steps."""

    always: bool
    if_started: bool
    longer: bool


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--cache", required=True, type=PLACE, help="Store: a folder, zip archive or URL."
)
@click.option(
    "--stage",
    type=PATH,
    help="Local folder to copy the store to first, once, and to train from.",
)
@click.option(
    "--strategy",
    help=f"{', '.join(STRATEGIES.built_in)}, an installed plug-in, or several joined "
    "with +. Default: none.",
)
@click.option("--student", help="painn-small, painn-big, schnet, ...; see the README.")
@click.option("--config", type=PATH, help="YAML configuration.")
@click.option("--set", "overrides", multiple=True, help="a.b=value in the config.")
@click.option("--out", type=PATH, help="Run folder.")
@click.option("--resume", is_flag=True, help="Continue the run in --out.")
@click.option("--auto-resume", is_flag=True, help="Like --resume if there is a run.")
@click.option(
    "--extend",
    is_flag=True,
    help="Like --resume, and --steps may be more than the run had.",
)
@click.option("--seed", type=int, help="Of initial weights and sample order.")
@click.option("--steps", type=int, help="Optimiser steps.")
@click.option(
    "--device",
    help="cpu, cuda, cuda:1; default: a GPU if any (of each process its own).",
)
@click.option("--threads", type=THREADS, help="CPU threads of torch.")
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
    extend: bool,
    seed: int | None,
    steps: int | None,
    device: str | None,
    threads: int | None,
) -> None:
    """Train a student against the store of teacher features at CACHE.

    Started by torchrun, several processes train one student together.
    """
    flags = {
        "strategy": strategy,
        "student.preset": student,
        "seed": seed,
        "steps": steps,
    }
    world = read_world(os.environ)
    if not world.is_first:
        propagate_warnings()
    with process_group(world, device):
        chosen = load_config(config, flags, overrides)
        if stage is not None:
            from pipeline.store.transfer import stage_store

            cache = str(stage_store(cache, stage))
        resuming = _ResumeOptions(
            resume or (extend and not auto_resume), auto_resume, extend
        )
        told = _train(chosen, cache, out, world, device, threads, resuming)
    if world.is_first:
        click.echo(told)


def _train(
    config: TrainConfig,
    cache: str,
    out: Path | None,
    world: World,
    device: str | None,
    threads: int | None,
    resuming: _ResumeOptions,
) -> str:
    """Train as asked for; returns the folder and the metrics in one line."""
    import torch

    from kd_train.trainer.setup import choose_student
    from kd_train.trainer.trainer import Trainer
    from pipeline.store.reader import FeatureStore

    if threads is not None:
        torch.set_num_threads(threads)
    place = choose_device(process_device(world, device))
    store = FeatureStore.open(cache)
    chosen = choose_student(config, store)
    folder = out or Path("runs") / world.gather_text(_name(chosen))[0]
    # One process holds the folder, for all that train together.
    with hold_lock(folder) if world.is_first else nullcontext():
        started = (folder / "last.pt").exists()
        if started and not resuming.always and not resuming.if_started:
            raise SpecError(f"{folder} holds a run; add --resume or change --out.")
        run = Trainer(chosen, store, folder, place, world)
        if world.is_first:
            log_to_file(folder / "train.log")
        resume = resuming.always or (resuming.if_started and started)
        summary = run.train(resume=resume, extend=resuming.longer)
    metrics = ", ".join(
        f"{k} {v:.4g}" for k, v in summary["metrics"].items() if v is not None
    )
    return f"{folder}: {metrics}"


def _name(config: TrainConfig) -> str:
    """Of the run folder, where the user names none."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{config.student.name}-{config.strategy}-s{config.seed}-{stamp}"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", nargs=-1, required=True, type=PATH)
@click.option("--out", required=True, type=PATH, help="Folder.")
@click.option(
    "--partial",
    is_flag=True,
    help="List runs that are unfinished, failed or not comparable.",
)
@click.option(
    "--cka",
    multiple=True,
    type=PATH,
    help="Folder that kd-cka wrote, to be shown as well.",
)
@one_sentence_errors
def report_main(
    runs: tuple[Path, ...], out: Path, partial: bool, cka: tuple[Path, ...]
) -> None:
    """Compare finished RUNS: gap-closed table, learning curves, parity plots."""
    from kd_train.report.report import write_report

    log_to_file(out / "report.log", logging.WARNING)
    click.echo(write_report(list(runs), out, partial=partial, cka=cka))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", nargs=2, metavar="MODEL_A MODEL_B")
@click.option(
    "--data", required=True, type=PLACE, help="Store: a folder, zip archive or URL."
)
@click.option("--split", required=True, help="A split, or several joined with +.")
@click.option("--out", required=True, type=PATH, help="Folder.")
@click.option("--limit", type=click.IntRange(min=1), help="Samples at most.")
@click.option(
    "--batch-atoms", type=click.IntRange(min=1), default=2000, show_default=True
)
@click.option(
    "--any-element",
    is_flag=True,
    help="Take samples with elements that the training data of a model lacked.",
)
@click.option("--device", help="cpu, cuda, cuda:1; default: a GPU if any.")
@click.option("--threads", type=THREADS, help="CPU threads of torch.")
@one_sentence_errors
def cka_main(
    models: tuple[str, str],
    data: str,
    split: str,
    out: Path,
    limit: int | None,
    batch_atoms: int,
    any_element: bool,
    device: str | None,
    threads: int | None,
) -> None:
    """Similarity (linear CKA) of node features between all layers of two models.

    A model is a run folder, a model file, or the word teacher for the features that
    the store holds.
    """
    import torch

    from kd_train.evaluation.cka import compare_models
    from kd_train.report.heatmap import write_similarity
    from pipeline.store.reader import FeatureStore

    if threads is not None:
        torch.set_num_threads(threads)
    place = choose_device(device)
    store = FeatureStore.open(data)
    found = compare_models(
        models,
        store,
        split,
        place,
        limit=limit,
        batch_atoms=batch_atoms,
        any_element=any_element,
    )
    with hold_lock(out):
        click.echo(write_similarity(found, out), nl=False)
