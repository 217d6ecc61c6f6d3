"""Commands of ``kd-cache`` that run a teacher. Heavy imports happen in commands."""

import logging
import sys
from pathlib import Path

import click

from pipeline.cli.options import spec_argument
from pipeline.cli.progress import end_on_signals, log_path
from pipeline.console import (
    CHECK_FAILED,
    PATH,
    device_option,
    one_sentence_errors,
    set_option,
)
from pipeline.logs import log_to_file
from pipeline.parallel.device_choice import choose_device


@click.command("check-teacher")
@spec_argument
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Number of samples to try the teacher on.",
)
@click.option(
    "--tolerance",
    type=float,
    default=1e-3,
    show_default=True,
    help="Largest deviation that passes, relative to the size of a field.",
)
@device_option
@set_option
@one_sentence_errors
@end_on_signals("the check is not finished, and the same command starts it again")
def check_teacher(
    spec: Path,
    samples: int,
    tolerance: float,
    device: str | None,
    overrides: tuple[str, ...],
) -> None:
    """Try the teacher of SPEC on some of its samples; exit 1 if it breaks a promise.

    Batches, rotations, renumbered atoms, sums over atoms, slopes of the energy: what
    the teacher declares and claims. Deviations are relative to a field's size.
    """
    from pipeline.errors import ContractError
    from pipeline.spec.cache_spec import load_spec

    chosen = load_spec(spec, overrides)
    log_to_file(log_path(chosen.store.path), logging.WARNING)

    from pipeline.build.check_teacher import try_teacher

    try:
        for name, worst in try_teacher(
            chosen, samples, tolerance, choose_device(device)
        ):
            click.echo(f"{name:16} kept (largest deviation {worst:.1e})")
    except ContractError as error:
        click.echo(f"{error}", err=True)
        sys.exit(CHECK_FAILED)


@click.command()
@spec_argument
@click.option(
    "--out",
    required=True,
    type=PATH,
    help="Folder for the labelled structures.",
)
@device_option
@set_option
@one_sentence_errors
@end_on_signals("the same command starts again")
def label(
    spec: Path, out: Path, device: str | None, overrides: tuple[str, ...]
) -> None:
    """Write the structures of SPEC to the folder OUT with the teacher's labels.

    One extended-XYZ file per split, for structures that have no labels of their own.
    """
    from pipeline.spec.cache_spec import load_spec

    chosen = load_spec(spec, overrides)
    log_to_file(out / "label.log", logging.WARNING)

    from pipeline.build.label import label_splits
    from pipeline.files.atomic import hold_lock

    with hold_lock(out):
        for file in label_splits(chosen, out, str(choose_device(device))):
            click.echo(f"{file}")
