"""Command of ``kd-cache`` that chooses samples to label; imports happen in it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.progress import check_bar, end_on_signals
from pipeline.console import (
    FILE,
    PLACE,
    json_option,
    one_sentence_errors,
    print_result,
)

if TYPE_CHECKING:
    from pipeline.build.choose_points import Method

_BY = {
    "farthest": "by farthest points",
    "leverage": "by leverage",
    "random": "at random",
}


@click.command()
@click.argument("store", type=PLACE)
@click.option("--split", required=True, help="Split to choose from.")
@click.option(
    "--budget",
    type=click.IntRange(min=1),
    required=True,
    help="Number of samples to choose.",
)
@click.option(
    "--out",
    type=FILE,
    required=True,
    help="File for the ids, one a line, in the order of the choice.",
)
@click.option(
    "--method",
    type=click.Choice([*_BY]),
    default="farthest",
    show_default=True,
    help="Rule of the choice. farthest: each sample is farthest from all before it; "
    "leverage: random, weighted by leverage scores; random: all samples alike.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Random seed; of farthest, it decides the first sample and ties.",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="SPLIT",
    help="Split of samples that have labels; may be repeated. Its structures are not "
    "chosen, and farthest starts from them. Default: none.",
)
@json_option
@one_sentence_errors
@end_on_signals("nothing is written, and the same command starts again")
def select(
    store: str,
    split: str,
    budget: int,
    out: Path,
    method: "Method",
    seed: int,
    exclude: tuple[str, ...],
    as_json: bool,
) -> None:
    """Choose the samples of STORE to label by their cached node_features.

    The file of ids is for `ids:` of a split.
    """
    from pipeline.build.select_samples import Wish, select_samples

    wish = Wish(split, budget, method, seed, exclude)
    with check_bar("select", unit="sample") as count:
        found = select_samples(store, wish, out, count)
    print_result(found, _summary(found), as_json)


def _summary(found: dict[str, Any]) -> str:
    return (
        f"{found['out']}: {found['budget']} of {found['candidates']} samples of "
        f"{found['split']}, {_BY[found['method']]}; the distance of a sample to the "
        f"nearest chosen one is {found['mean_distance']:.3f} on average and "
        f"{found['largest_distance']:.3f} at most."
    )
