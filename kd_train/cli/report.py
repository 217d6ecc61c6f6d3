"""``kd-report`` and ``kd-cka``. Heavy imports happen inside the commands."""

import csv
import io
import logging
import math
from dataclasses import asdict
from pathlib import Path

import click

from pipeline.console import (
    HELP,
    PATH,
    PLACE,
    device_option,
    json_option,
    one_sentence_errors,
    print_result,
    threads_option,
    version_option,
)
from pipeline.files.atomic import hold_lock
from pipeline.logs import log_to_file
from pipeline.parallel.device_choice import choose_device


@click.command(context_settings=HELP)
@version_option
@click.argument("runs", nargs=-1, required=True, type=PATH)
@click.option(
    "--out",
    required=True,
    type=PATH,
    help="Folder for the results.",
)
@click.option(
    "--partial",
    is_flag=True,
    help="Listing of runs that are unfinished, failed or not comparable. Default: such "
    "runs are refused.",
)
@click.option(
    "--cka",
    multiple=True,
    type=PATH,
    help="Folder that kd-cka wrote, to show as well; may be repeated. Default: none.",
)
@json_option
@one_sentence_errors
def report_main(
    runs: tuple[Path, ...],
    out: Path,
    partial: bool,
    cka: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Compare finished RUNS: gap-closed table, learning curves, parity plots."""
    from kd_train.report.report import write_report

    log_to_file(out / "report.log", logging.WARNING)
    text = write_report(list(runs), out, partial=partial, cka=cka)
    lines = csv.DictReader(io.StringIO((out / "table.csv").read_text()))
    rows = [{key: _number(cell) for key, cell in row.items()} for row in lines]
    print_result({"out": str(out), "rows": rows}, text, as_json)


def _number(cell: str) -> float | str | None:
    """The number in a cell of a table, or its text; None of an empty cell."""
    try:
        return float(cell)
    except ValueError:
        return cell or None


@click.command(context_settings=HELP)
@version_option
@click.argument("models", nargs=2, metavar="MODEL_A MODEL_B")
@click.option(
    "--data",
    "--store",
    "data",
    required=True,
    type=PLACE,
    help="Store with the samples: a folder, zip archive or URL.",
)
@click.option(
    "--split",
    "splits",
    multiple=True,
    required=True,
    help="Split to compare on; may be repeated, and several may be joined with +.",
)
@click.option(
    "--out",
    required=True,
    type=PATH,
    help="Folder for the results.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Largest number of samples. Default: all of them.",
)
@click.option(
    "--batch-atoms",
    type=click.IntRange(min=1),
    default=2000,
    show_default=True,
    help="Largest number of atoms in a batch.",
)
@click.option(
    "--any-element",
    is_flag=True,
    help="Use of samples with elements that the training data of a model lacked. "
    "Default: such samples are refused.",
)
@device_option
@threads_option
@json_option
@one_sentence_errors
def cka_main(
    models: tuple[str, str],
    data: str,
    splits: tuple[str, ...],
    out: Path,
    limit: int | None,
    batch_atoms: int,
    any_element: bool,
    device: str | None,
    threads: int | None,
    as_json: bool,
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
        "+".join(splits),
        place,
        limit=limit,
        batch_atoms=batch_atoms,
        any_element=any_element,
    )
    with hold_lock(out):
        text = write_similarity(found, out)
    matrix = [[v if math.isfinite(v) else None for v in row] for row in found.matrix]
    result = {**asdict(found), "matrix": matrix}
    print_result(result, text.removesuffix("\n"), as_json)
