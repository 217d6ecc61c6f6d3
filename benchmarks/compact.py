"""How small features can be stored, at which error, and whether students notice.

    python benchmarks/compact.py sizes STORE...
    python benchmarks/compact.py trials STORE...
    python benchmarks/compact.py train LOSSLESS OTHER... --config STUDENT

``sizes`` calibrates every profile on part of a store and measures it on the rest.
``trials`` compares other ways to pack the integers of `compact`. ``train`` trains equal
students from stores that differ only in precision.
"""

from pathlib import Path

import click
from compact_measure import samples_of
from compact_sizes import size_table
from compact_train import loaded_dtype, run_all, train_table
from compact_trials import trial_table
from numcodecs import blosc

STORES = click.argument(
    "stores", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path)
)
ROWS = click.option("--rows", default=24576, show_default=True, help="Atoms at most.")
SPLIT = click.option("--split", default="train", show_default=True)


@click.group()
def main() -> None:
    """Measure the lossy profiles."""
    blosc.set_nthreads(1)


@main.command()
@STORES
@ROWS
@SPLIT
def sizes(stores: tuple[Path, ...], rows: int, split: str) -> None:
    """Size against error of every feature, beside what theory allows."""
    for store in stores:
        for sample in samples_of(store, split, rows):
            click.echo("\n".join([*size_table(sample), ""]))


@main.command()
@STORES
@ROWS
@SPLIT
def trials(stores: tuple[Path, ...], rows: int, split: str) -> None:
    """Sizes of other ways to pack, over the size of ours at equal error."""
    samples = [s for store in stores for s in samples_of(store, split, rows)]
    click.echo("\n".join(trial_table(samples)))


@main.command()
@STORES
@click.option("--config", required=True, type=click.Path(exists=True))
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/compact"))
@click.option("--student", default="painn-small-demo", show_default=True)
@click.option("--strategies", default="n2n,e2n,v2v", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--steps", default=1000, show_default=True)
@click.option("--jobs", default=1, show_default=True)
def train(
    stores: tuple[Path, ...],
    config: str,
    out: Path,
    student: str,
    strategies: str,
    seeds: str,
    steps: int,
    jobs: int,
) -> None:
    """Errors of students from each store; the first one is what others are held to."""
    chosen = strategies.split(",")
    for store in stores:
        dtypes = ", ".join(f"{s} {loaded_dtype(store, s)}" for s in chosen)
        click.echo(f"{store.stem} gives the loader: {dtypes}")
    options = ["--config", config, "--student", student, "--threads", "1"]
    options += ["--set", f"steps={steps}", "--set", f"eval_every={steps}"]
    found = run_all(stores, out, options, chosen, seeds.split(","), jobs)
    click.echo(f"{student}, {steps} steps, seeds {seeds}")
    click.echo("\n".join(train_table(found, [store.stem for store in stores])))


if __name__ == "__main__":
    main()
