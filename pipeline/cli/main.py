"""``kd-cache``: build, inspect and verify stores. Heavy imports happen in commands."""

import json
import logging
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.progress import build_progress, check_bar, end_on_signals
from pipeline.cli.store import COMMANDS, log_path, workers_option
from pipeline.console import CHECK_FAILED, PATH, THREADS, one_sentence_errors
from pipeline.logs import log_to_file
from pipeline.parallel.device_choice import choose_device

if TYPE_CHECKING:
    from pipeline.build.part import BuildPart
    from pipeline.spec.cache_spec import CacheSpec


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Cache the features of a trained teacher in a Zarr store."""


for _command in COMMANDS:
    main.add_command(_command)


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


_device_option = click.option(
    "--device", default=None, help="cpu, cuda, cuda:1; default: a GPU if any."
)
_set_option = click.option(
    "--set", "overrides", multiple=True, help="key.subkey=value of the spec."
)
_threads_option = click.option("--threads", type=THREADS, help="CPU threads of torch.")


@main.command()
@click.argument("spec", type=PATH)
@click.option("--out", help="Where the store goes; overrides store.path.")
@_device_option
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Processes to fill blocks with, one per GPU; 0: this one.",
)
@click.option(
    "--scheduler", help="Address of a Dask cluster whose workers fill blocks instead."
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Of a block, after a lost worker or a failing disk, network or device.",
)
@click.option("--blocks", help="Half-open range A:B of blocks, of every split.")
@click.option(
    "--part",
    help="I/N: the I-th of N shares of the blocks, for array jobs; after `plan`.",
)
@_set_option
@_threads_option
@click.option(
    "--receipt",
    type=PATH,
    help="Written once the store is sealed: what a workflow engine waits for.",
)
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
    receipt: Path | None,
) -> None:
    """Build the store of SPEC, or continue it; a finished store is left alone.

    How far it is stands in STORE.status.json. Ctrl-C ends it at once, and the same
    command goes on where it stopped.
    """
    chosen = _spec_for_store(spec, out, overrides)
    block_range = _block_range(blocks)
    share = _chosen_part(part, {"--blocks": blocks, "--receipt": receipt})
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
    if share is None:
        _tell_contents(store)
    if not sealed:
        rest = "the store is not sealed" if share else "others are still missing"
        click.echo(f"{store}: the blocks asked for are done, {rest}.")
        return
    click.echo(f"{store}: complete and sealed.")
    if receipt is not None:
        _write_receipt(receipt, store)


def _tell_contents(store: Path) -> None:
    """Print what planning found in the data."""
    from pipeline.cli.info import render_contents

    text = render_contents(store)
    if text:
        click.echo(text)


def _write_receipt(receipt: Path, store: Path) -> None:
    from pipeline.files.atomic import write_atomically
    from pipeline.store.describe import describe_store

    text = json.dumps(describe_store(store), indent=2, sort_keys=True)
    write_atomically(receipt, text.encode() + b"\n")


@main.command()
@click.argument("spec", type=PATH)
@click.option("--out", help="Where the store goes; overrides store.path.")
@_device_option
@_set_option
@_threads_option
@workers_option
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
) -> None:
    """Plan the store of SPEC without filling it, for `build --part`; then `seal`."""
    chosen = _spec_for_store(spec, out, overrides)

    from pipeline.build.build import plan_store
    from pipeline.store.writer import StoreWriter

    _, place = _started(chosen, device, threads)
    with check_bar("plan", "sample") as count:
        store = plan_store(chosen, place, workers, count)
    _tell_contents(store)
    blocks = (
        f"{s.n_blocks} of {name}" for name, s in StoreWriter(store).splits.items()
    )
    click.echo(f"{store}: planned; blocks: {', '.join(blocks)}.")


@main.command()
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


@main.command(name="add-field")
@click.argument("spec", type=PATH)
@click.option("--out", help="Where the store lies; overrides store.path.")
@_device_option
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True)
@_set_option
@_threads_option
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


@main.command("check-teacher")
@click.argument("spec", type=PATH)
@click.option("--samples", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--tolerance", type=float, default=1e-3, show_default=True)
@_device_option
@_set_option
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


@main.command()
@click.argument("spec", type=PATH)
@click.option("--out", required=True, type=PATH)
@_device_option
@_set_option
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


@main.command()
def schema() -> None:
    """Print the JSON schema of spec files."""
    from pipeline.spec.cache_spec import CacheSpec

    click.echo(json.dumps(CacheSpec.model_json_schema(), indent=2, sort_keys=True))
