"""Commands of ``kd-cache`` on stores that are there; imports happen in commands."""

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from pipeline.cli.progress import check_bar, end_on_signals, progress_bar
from pipeline.console import CHECK_FAILED, PATH, PLACE, one_sentence_errors
from pipeline.files.remote import is_url
from pipeline.logs import log_to_file
from pipeline.parallel.device_choice import choose_device

if TYPE_CHECKING:
    from pipeline.build.convert import Conversion
    from pipeline.store.verify import Problem

workers_option = click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Processes to work in; 0: this one.",
)


def log_path(store: Path | str) -> Path:
    """The log beside a store."""
    place = Path(store)
    return place.with_name(f"{place.name}.log")


def _keep_warnings(store: str) -> None:
    """Keep warnings in the log of a store that lies on a local disk."""
    if not is_url(store):
        log_to_file(log_path(store), logging.WARNING)


def _convert(store: str, out: Path, conversion: "Conversion", workers: int) -> None:
    from pipeline.build.convert import convert_store

    log_to_file(log_path(out))
    with progress_bar() as bar:
        convert_store(store, out, conversion, bar.show_block, workers, bar.show_pass)
    click.echo(f"{out}: complete and sealed.")


_field_option = click.option(
    "--field", "fields", multiple=True, help="Only this feature; may be repeated."
)


@click.command()
@click.argument("store", type=PLACE)
@click.argument("out", type=PATH)
@click.option(
    "--profile",
    type=click.Choice(["compact", "q8"]),
    default="compact",
    show_default=True,
    help="compact: smallest; q8: a quarter of float32, read at once.",
)
@click.option(
    "--error",
    type=float,
    help="Of compact: squared error relative to the variance; default 0.001.",
)
@_field_option
@workers_option
@one_sentence_errors
@end_on_signals()
def compact(
    store: str,
    out: Path,
    profile: Literal["compact", "q8"],
    error: float | None,
    fields: tuple[str, ...],
    workers: int,
) -> None:
    """Write STORE to OUT with smaller features."""
    from pipeline.build.convert import make_conversion

    _convert(store, out, make_conversion(profile, error=error, fields=fields), workers)


@click.command()
@click.argument("store", type=PLACE)
@click.argument("out", type=PATH)
@click.option(
    "--profile",
    type=click.Choice(["faithful", "q8"]),
    default="faithful",
    show_default=True,
    help="Both are read without decoding chunks.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32"]),
    help="Of faithful; default: the field's own.",
)
@_field_option
@workers_option
@one_sentence_errors
@end_on_signals()
def hydrate(
    store: str,
    out: Path,
    profile: Literal["faithful", "q8"],
    dtype: Literal["float16", "float32"] | None,
    fields: tuple[str, ...],
    workers: int,
) -> None:
    """Write STORE, which may be a URL, to OUT with features that are fast to read."""
    from pipeline.build.convert import make_conversion

    _convert(store, out, make_conversion(profile, dtype=dtype, fields=fields), workers)


@click.command()
@click.argument("store", type=PLACE)
@click.argument("target")
@click.option("--verify", "check", is_flag=True, help="Read every byte back.")
@one_sentence_errors
@end_on_signals()
def push(store: str, target: str, check: bool) -> None:
    """Copy STORE to TARGET, a URL or a folder; what is there already stays.

    Of a store that is not finished the finished blocks; give the command again for the
    rest. The copy counts as complete with its last byte.
    """
    from pipeline.store.transfer import copy_store

    _keep_warnings(store)
    with progress_bar() as bar:
        complete = copy_store(store, target, bar.show_block)
    if not complete:
        click.echo(f"{target}: the finished blocks are there, others are missing.")
        return
    click.echo(f"{target}: complete and sealed.")
    if check:
        sys.exit(CHECK_FAILED if _verify(target, workers=0) else 0)


@click.command()
@click.argument("store", type=PLACE)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@click.option("--csv", "as_csv", is_flag=True, help="A table with a line per field.")
@one_sentence_errors
def info(store: str, as_json: bool, as_csv: bool) -> None:
    """Say what is inside STORE: a folder, a zip archive or a URL."""
    from pipeline.cli.info import field_table, render_description
    from pipeline.store.describe import describe_store

    description = describe_store(store)
    if as_csv:
        click.echo(field_table(description), nl=False)
    elif as_json:
        click.echo(json.dumps(description, indent=2, sort_keys=True))
    else:
        click.echo(render_description(description))


@click.command()
@click.argument("store", type=PLACE)
@click.option("--repair", is_flag=True, help="Discard damaged blocks for `build`.")
@click.option(
    "--teacher",
    is_flag=True,
    help="Also run the teacher on random samples and compare.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Of every split, to compare with the teacher.",
)
@click.option("--set", "overrides", multiple=True, help="teacher.checkpoint=PATH etc.")
@click.option("--device", default=None, help="Of the teacher; default: a GPU if any.")
@workers_option
@one_sentence_errors
@end_on_signals("the check is not finished, and the same command starts it again")
def verify(
    store: str,
    repair: bool,
    teacher: bool,
    samples: int,
    overrides: tuple[str, ...],
    device: str | None,
    workers: int,
) -> None:
    """Check every byte of STORE; exit 1 when something is damaged."""
    _keep_warnings(store)
    problems = _verify(store, workers)
    if not problems:
        if teacher:
            _compare_with_teacher(store, samples, device, overrides)
        return
    if repair:
        from pipeline.store.repair import discard_damaged

        click.echo(discard_damaged(store, problems), err=True)
    sys.exit(CHECK_FAILED)


def _verify(store: str, workers: int) -> list["Problem"]:
    """Problems of the store, told as they are found."""
    from pipeline.store.verify import verify_store

    with check_bar("verify") as count:
        problems = verify_store(store, workers, count)
    for problem in problems:
        click.echo(f"{problem}", err=True)
    if not problems:
        click.echo(f"{store}: everything checked, nothing damaged.")
    return problems


def _compare_with_teacher(
    store: str, samples: int, device: str | None, overrides: tuple[str, ...]
) -> None:
    from pipeline.build.recompute import spot_check

    place = str(choose_device(device))
    found, compared = spot_check(store, samples, device=place, overrides=overrides)
    for difference in found:
        click.echo(f"{difference}", err=True)
    if found:
        sys.exit(CHECK_FAILED)
    click.echo(f"{store}: {compared} fields of samples are what the teacher gives.")


COMMANDS = (compact, hydrate, push, info, verify)
