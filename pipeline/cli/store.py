"""Commands of ``kd-cache`` on stores that are there; imports happen in commands."""

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from pipeline.cli.options import field_option, workers_option
from pipeline.cli.progress import check_bar, end_on_signals, log_path, progress_bar
from pipeline.console import (
    CHECK_FAILED,
    PATH,
    PLACE,
    device_option,
    json_option,
    one_sentence_errors,
    set_option,
)
from pipeline.files.remote import is_url
from pipeline.logs import log_to_file
from pipeline.parallel.device_choice import choose_device

if TYPE_CHECKING:
    from pipeline.build.convert import Conversion
    from pipeline.store.verify import Problem


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


_error_option = click.option(
    "--max-relative-error",
    "--error",
    "error",
    type=float,
    help="Squared error of compact, relative to the variance. Default: 0.001.",
)
_dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float16", "float32"]),
    help="Number format of faithful. Default: the format of the field.",
)


@click.command()
@click.argument("store")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--profile",
    type=click.Choice(["faithful", "q8", "compact"]),
    required=True,
    help="Form of the features. faithful: as computed; q8: a quarter of float32; "
    "compact: smallest. faithful and q8 are read without decoding chunks.",
)
@_error_option
@_dtype_option
@field_option
@workers_option
@one_sentence_errors
@end_on_signals()
def convert(
    store: str,
    out: Path,
    profile: Literal["faithful", "q8", "compact"],
    error: float | None,
    dtype: Literal["float16", "float32"] | None,
    fields: tuple[str, ...],
    workers: int,
) -> None:
    """Write STORE, which may be a URL, to OUT with features of another profile."""
    from pipeline.build.convert import make_conversion

    conversion = make_conversion(profile, error=error, dtype=dtype, fields=fields)
    _convert(store, out, conversion, workers)


@click.command()
@click.argument("store", type=PLACE)
@click.argument("out", type=PATH)
@click.option(
    "--profile",
    type=click.Choice(["compact", "q8"]),
    default="compact",
    show_default=True,
    help="Form of the features. compact: smallest; q8: a quarter of float32, which is "
    "read without decoding chunks.",
)
@_error_option
@field_option
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
    """Write STORE to OUT with smaller features, as `convert` does."""
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
    help="Form of the features; both are read without decoding chunks.",
)
@_dtype_option
@field_option
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
    """Write STORE, which may be a URL, to OUT with features that are fast to read.

    The same as `convert`.
    """
    from pipeline.build.convert import make_conversion

    _convert(store, out, make_conversion(profile, dtype=dtype, fields=fields), workers)


@click.command()
@click.argument("store", type=PLACE)
@click.argument("target")
@click.option(
    "--verify", "check", is_flag=True, help="Check of the copy, which reads every byte."
)
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
@click.argument("store")
@json_option
@click.option(
    "--csv", "as_csv", is_flag=True, help="Format of the output: a CSV line per field."
)
@one_sentence_errors
def info(store: str, as_json: bool, as_csv: bool) -> None:
    """Print what STORE contains: a folder, a zip archive or a URL."""
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
@click.argument("store")
@click.option(
    "--repair",
    is_flag=True,
    help="Removal of damaged blocks, so that `build` makes them again.",
)
@click.option(
    "--teacher",
    is_flag=True,
    help="Comparison of random samples with the teacher, in addition.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Number of samples of every split to compare with the teacher.",
)
@set_option
@device_option
@workers_option
@json_option
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
    as_json: bool,
) -> None:
    """Check every byte of STORE; exit 1 if something is damaged."""
    _keep_warnings(store)
    problems = _verify(store, workers, quiet=as_json)
    result: dict[str, Any] = {"store": store, "problems": list(map(str, problems))}
    failed = bool(problems)
    if teacher and not problems:
        differences, compared = _compare_with_teacher(
            store, samples, device, overrides, quiet=as_json
        )
        result |= {"compared_fields": compared, "differences": differences}
        failed = bool(differences)
    if problems and repair:
        from pipeline.store.repair import discard_damaged

        click.echo(discard_damaged(store, problems), err=True)
    if as_json:
        click.echo(json.dumps(result, indent=2, ensure_ascii=False))
    if failed:
        sys.exit(CHECK_FAILED)


def _verify(store: str, workers: int, *, quiet: bool = False) -> list["Problem"]:
    """Problems of the store, told as they are found."""
    from pipeline.store.verify import verify_store

    with check_bar("verify") as count:
        problems = verify_store(store, workers, count)
    for problem in problems:
        click.echo(f"{problem}", err=True)
    if not problems and not quiet:
        click.echo(f"{store}: everything checked, nothing damaged.")
    return problems


def _compare_with_teacher(
    store: str,
    samples: int,
    device: str | None,
    overrides: tuple[str, ...],
    *,
    quiet: bool,
) -> tuple[list[str], int]:
    """Differences in words, which standard error has too, and the fields compared."""
    from pipeline.build.recompute import spot_check

    place = str(choose_device(device))
    found, compared = spot_check(store, samples, device=place, overrides=overrides)
    for difference in found:
        click.echo(f"{difference}", err=True)
    if not found and not quiet:
        click.echo(f"{store}: {compared} fields of samples are what the teacher gives.")
    return list(map(str, found)), compared


@click.command()
def schema() -> None:
    """Print the JSON schema of spec files."""
    from pipeline.spec.cache_spec import CacheSpec

    click.echo(json.dumps(CacheSpec.model_json_schema(), indent=2, sort_keys=True))
