"""Commands of ``kd-cache`` that make stores. Heavy imports happen in commands."""

import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.options import (
    fill_workers_option,
    out_option,
    spec_argument,
    workers_option,
)
from pipeline.cli.progress import build_progress, check_bar, end_on_signals, log_path
from pipeline.console import (
    PATH,
    device_option,
    json_option,
    one_sentence_errors,
    print_result,
    set_option,
    threads_option,
)
from pipeline.logs import log_to_file
from pipeline.parallel.device_choice import choose_device

if TYPE_CHECKING:
    from pipeline.build.part import BuildPart
    from pipeline.spec.cache_spec import CacheSpec


def _block_range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    numbers = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", text)
    if numbers is None or int(numbers[1]) >= int(numbers[2]):
        raise click.BadParameter(f"--blocks {text!r} must look like 0:8.")
    return int(numbers[1]), int(numbers[2])


def _chosen_part(text: str | None, others: dict[str, object]) -> "BuildPart | None":
    """The part that was asked for; refuses options that a part cannot have."""
    if text is None:
        return None
    from pipeline.build.part import BuildPart

    for option, value in others.items():
        if value is not None:
            raise click.BadParameter(
                f"--part fills its blocks and seals nothing, so leave out {option}."
            )
    return BuildPart.parse(text)


def _spec_for_store(
    spec: Path, out: str | None, overrides: tuple[str, ...]
) -> "CacheSpec":
    from pipeline.errors import SpecError
    from pipeline.files.remote import is_url
    from pipeline.spec.cache_spec import load_spec

    if is_url(out):
        raise SpecError(
            f"--out {out} is a URL, and a store is built on a local disk; build it "
            f"there and `kd-cache push STORE {out}`."
        )
    return load_spec(spec, overrides, None if out is None else Path(out))


def _started(
    spec: "CacheSpec", device: str | None, threads: int | None
) -> tuple[Path, str]:
    """Where the store lies and the device, with threads and the log set up."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    place = str(choose_device(device))
    store = Path(spec.store.path)
    log_to_file(log_path(store))
    return store, place


@click.command()
@spec_argument
@out_option
@device_option
@fill_workers_option
@click.option(
    "--scheduler",
    help="Address of a Dask cluster whose workers fill blocks. Default: no cluster.",
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Number of retries of a block after a lost worker or a failing disk, network "
    "or device.",
)
@click.option(
    "--blocks",
    metavar="A:B",
    help="Range of blocks to fill in every split, without block B. Default: all.",
)
@click.option(
    "--part",
    metavar="I/N",
    help="Share of the blocks to fill, for array jobs after `plan`. Default: all.",
)
@set_option
@threads_option
@click.option(
    "--done-file",
    "--receipt",
    type=PATH,
    help="File to write when the store is sealed, for workflow engines. Default: none.",
)
@json_option
@one_sentence_errors
@end_on_signals()
def build(
    spec: Path,
    out: str | None,
    device: str | None,
    workers: int,
    scheduler: str | None,
    retries: int,
    blocks: str | None,
    part: str | None,
    overrides: tuple[str, ...],
    threads: int | None,
    done_file: Path | None,
    as_json: bool,
) -> None:
    """Build the store of SPEC, or continue it; a finished store is left alone.

    How far it is stands in STORE.status.json. Ctrl-C ends it at once, and the same
    command goes on where it stopped.
    """
    chosen = _spec_for_store(spec, out, overrides)
    block_range = _block_range(blocks)
    share = _chosen_part(part, {"--blocks": blocks, "--done-file": done_file})
    if workers and scheduler is not None:
        raise click.UsageError("--workers and --scheduler exclude each other.")

    from pipeline.build.build import build_store
    from pipeline.build.worker import FillOptions

    store, place = _started(chosen, None if scheduler else device, threads)
    filling = FillOptions(
        device=device if scheduler else place,
        workers=workers,
        scheduler=scheduler,
        threads=threads,
        retries=retries,
        blocks=block_range,
        part=share,
    )
    with build_progress(store, filling.label) as (bar, progress):
        sealed = build_store(
            chosen,
            filling=filling,
            report=bar.show_block,
            count=bar.show_pass,
            progress=progress,
        )
    if share is None and not as_json:
        _tell_contents(store)
    text = f"{store}: complete and sealed."
    if not sealed:
        rest = "the store is not sealed" if share else "others are still missing"
        text = f"{store}: the blocks asked for are done, {rest}."
    print_result({"store": str(store), "sealed": sealed}, text, as_json)
    if sealed and done_file is not None:
        _write_done_file(done_file, store)


def _tell_contents(store: Path) -> None:
    """Print what planning found in the data."""
    from pipeline.cli.info import render_contents

    build_progress = render_contents(store)
    if build_progress:
        click.echo(build_progress)


def _write_done_file(done_file: Path, store: Path) -> None:
    from pipeline.files.atomic import write_atomically
    from pipeline.store.describe import describe_store

    text = json.dumps(describe_store(store), indent=2, sort_keys=True)
    write_atomically(done_file, text.encode() + b"\n")


@click.command()
@spec_argument
@out_option
@device_option
@set_option
@threads_option
@workers_option
@json_option
@one_sentence_errors
@end_on_signals(
    "a store is planned whole or not at all, so give the same command again"
)
def plan(
    spec: Path,
    out: str | None,
    device: str | None,
    overrides: tuple[str, ...],
    threads: int | None,
    workers: int,
    as_json: bool,
) -> None:
    """Plan the store of SPEC without filling it, for `build --part`; then `seal`."""
    chosen = _spec_for_store(spec, out, overrides)

    from pipeline.build.build import plan_store
    from pipeline.store.writer import StoreWriter

    _, place = _started(chosen, device, threads)
    with check_bar("plan", "sample") as count:
        store = plan_store(chosen, place, workers, count)
    if not as_json:
        _tell_contents(store)
    blocks = {name: s.n_blocks for name, s in StoreWriter(store).splits.items()}
    counts = ", ".join(f"{count} of {name}" for name, count in blocks.items())
    from pipeline.store.describe import describe_contents

    passes = describe_contents(store)["teacher_passes"]
    print_result(
        {"store": str(store), "blocks": blocks, "teacher_passes": passes},
        f"{store}: planned; blocks: {counts}.",
        as_json,
    )


@click.command()
@click.argument("store", type=PATH)
@workers_option
@one_sentence_errors
@end_on_signals("the store is not sealed, and the same command checks all blocks again")
def seal(store: Path, workers: int) -> None:
    """Check every block of STORE, whose parts are all filled, and seal it."""
    from pipeline.files.atomic import disk_full_as_error
    from pipeline.store.writer import StoreWriter

    log_to_file(log_path(store), logging.WARNING)
    with disk_full_as_error(store), check_bar("seal") as count:
        StoreWriter(store).seal(workers, count)
    click.echo(f"{store}: complete and sealed.")


@click.command(name="add-field")
@spec_argument
@out_option
@device_option
@fill_workers_option
@set_option
@threads_option
@one_sentence_errors
@end_on_signals()
def add_field(
    spec: Path,
    out: str | None,
    device: str | None,
    workers: int,
    overrides: tuple[str, ...],
    threads: int | None,
) -> None:
    """Add to a finished store what its SPEC gained: features, or whole splits.

    What the store has stays as it is, byte for byte, and readable all the time.
    """
    chosen = _spec_for_store(spec, out, overrides)

    from pipeline.build.extend import extend_store
    from pipeline.build.fill import FillOptions

    store, place = _started(chosen, device, threads)
    filling = FillOptions(device=place, workers=workers, threads=threads)
    with build_progress(store) as (bar, progress):
        added = extend_store(
            chosen,
            filling=filling,
            report=bar.show_block,
            count=bar.show_pass,
            progress=progress,
        )
    what = ", ".join(added) if added else "nothing, it has all of it already"
    click.echo(f"{store}: added {what}; complete and sealed.")
