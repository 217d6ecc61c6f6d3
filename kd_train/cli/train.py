"""``kd-train``. Heavy imports happen inside the command."""

import os
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import click

from kd_train.cli.report import cka_main, report_main
from kd_train.config.sections import STRATEGY_ALIASES
from kd_train.config.strategy_names import STRATEGIES
from kd_train.config.train_config import TrainConfig, load_config
from kd_train.distributed import World, process_device, process_group, read_world
from pipeline.console import (
    HELP,
    PATH,
    PLACE,
    device_option,
    json_option,
    one_sentence_errors,
    print_result,
    set_option,
    threads_option,
    version_option,
)
from pipeline.errors import SpecError
from pipeline.files.atomic import hold_lock
from pipeline.logs import log_to_file, propagate_warnings
from pipeline.parallel.device_choice import choose_device

# Programs that were installed earlier look for all of these here.
__all__ = ["cka_main", "main", "report_main"]

_ALIASES = ", ".join(f"{a} is {b}" for a, b in STRATEGY_ALIASES.items())


class _ResumeOptions(NamedTuple):
    """Whether a run that is in the folder goes on, and whether with more steps."""

    always: bool
    if_started: bool
    longer: bool


@click.command(context_settings=HELP)
@version_option
@click.option(
    "--cache",
    "--store",
    "cache",
    required=True,
    type=PLACE,
    help="Store to train on: a folder, zip archive or URL.",
)
@click.option(
    "--local-copy",
    "--stage",
    type=PATH,
    help="Local folder to copy the store to, once, and to train from. Default: none.",
)
@click.option(
    "--strategy",
    help=f"Strategy of distillation: {', '.join(STRATEGIES.built_in)}, an installed "
    f"plug-in, or several joined with +. {_ALIASES}. Default: none.",
)
@click.option(
    "--student",
    help="Preset of the student: painn-small, painn-big, schnet, ...; see the README. "
    "Default: the student that the paper has for the teacher.",
)
@click.option(
    "--config",
    type=PATH,
    help="YAML file with the configuration. Default: the built-in values.",
)
@set_option
@click.option(
    "--out",
    type=PATH,
    help="Folder of the run. Default: a new folder in runs/.",
)
@click.option(
    "--resume",
    is_flag=False,
    flag_value="always",
    default="never",
    show_default=True,
    type=click.Choice(["never", "auto", "always"]),
    help="Continuation of the run in --out. auto: if there is a run; without a value: "
    "always.",
)
@click.option("--auto-resume", is_flag=True, help="The same as --resume auto.")
@click.option(
    "--extend",
    is_flag=True,
    help="Continuation as with --resume, in which --steps may be more than before.",
)
@click.option(
    "--seed",
    type=int,
    help="Seed of initial weights and sample order. Default: of the configuration.",
)
@click.option(
    "--steps",
    type=int,
    help="Number of optimiser steps. Default: of the recipe or configuration.",
)
@device_option
@threads_option
@json_option
@one_sentence_errors
def main(
    cache: str,
    local_copy: Path | None,
    strategy: str | None,
    student: str | None,
    config: Path | None,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: str,
    auto_resume: bool,
    extend: bool,
    seed: int | None,
    steps: int | None,
    device: str | None,
    threads: int | None,
    as_json: bool,
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
        if local_copy is not None:
            from pipeline.store.transfer import stage_store

            cache = str(stage_store(cache, local_copy))
        if_started = auto_resume or resume == "auto"
        always = resume == "always" or (extend and not if_started)
        resuming = _ResumeOptions(always, if_started, extend)
        result = _train(chosen, cache, out, world, device, threads, resuming)
    if world.is_first:
        print_result(result, _one_line(result), as_json)


def _train(
    config: TrainConfig,
    cache: str,
    out: Path | None,
    world: World,
    device: str | None,
    threads: int | None,
    resuming: _ResumeOptions,
) -> dict[str, Any]:
    """Train as asked for; returns the folder of the run and what metrics.json has."""
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
    return {"folder": str(folder), **summary}


def _one_line(result: Mapping[str, Any]) -> str:
    """Folder and metrics of a run."""
    metrics = ", ".join(
        f"{k} {v:.4g}" for k, v in result["metrics"].items() if v is not None
    )
    return f"{result['folder']}: {metrics}"


def _name(config: TrainConfig) -> str:
    """Of the run folder, where the user names none."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{config.student.name}-{config.strategy}-s{config.seed}-{stamp}"
