"""How far features, teacher labels and both get on ethanol with few DFT labels.

    export KD_DATA=... PYTHONPATH=benchmarks/teachers OMP_NUM_THREADS=1
    kd-cache build benchmarks/specs/ethanol.yaml
    python benchmarks/unlabelled.py caches/ethanol.zarr results/unlabelled

Every row has the same steps, batches of the same size and, by seed, the same initial
weights. Weights of distillation terms are chosen on the split ``val`` with seed 0, in
shorter runs; the table is of the split ``test``. Finished runs are kept and interrupted
ones continued, so it may be killed and repeated; ``--rows`` and ``--seeds`` choose.
With ``--show`` nothing is trained, and the table is of what is finished.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
from compare import train

CONFIG = Path(__file__).parent / "specs" / "ethanol_student.yaml"
GRIDS = {
    "n2n": (1.0, 10.0, 100.0),
    "v2v": (10.0, 100.0, 1000.0),
    "vanilla2": (1.0, 10.0, 100.0),
}
TUNING_STEPS = 600
HEAD = (
    "| row | batches of | strategy (weights) | teacher labels | seeds "
    "| force MAE, meV/Å | energy MAE, meV |"
)
MORE, RATTLED = "train+unlabelled", "train+rattled"


@dataclass(frozen=True)
class Row:
    """What a student is trained on, and by which terms."""

    split: str
    strategy: str = "none"
    teacher_labels: float = 0.0

    @property
    def terms(self) -> tuple[str, ...]:
        """Distillation terms; none for a baseline."""
        return () if self.strategy == "none" else tuple(self.strategy.split("+"))

    @property
    def arguments(self) -> list[str]:
        """What ``kd-train`` is told of it, weights of the terms excepted."""
        chosen = ["--strategy", self.strategy, "--set", f"train_split={self.split}"]
        if self.teacher_labels:
            chosen += ["--set", f"loss.pseudo_label_weight={self.teacher_labels:g}"]
        return chosen

    def alone(self, term: str) -> "Row":
        """The row that a term's weight is chosen on: one for all rows with more data.

        Teacher labels are left out there, so that it is the same with and without.
        """
        return Row(self.split if self.split == "train" else MORE, term)

    def __str__(self) -> str:
        labels = f"-labels{self.teacher_labels:g}" if self.teacher_labels else ""
        return f"{self.split}-{self.strategy}{labels}"


ROWS = {
    "100": Row("train"),
    "100-n2n": Row("train", "n2n"),
    "100-v2v": Row("train", "v2v"),
    "100-v2v-vanilla2": Row("train", "v2v+vanilla2"),
    "more": Row(MORE),
    "more-n2n": Row(MORE, "n2n"),
    "more-v2v": Row(MORE, "v2v"),
    "more-v2v-vanilla2": Row(MORE, "v2v+vanilla2"),
    "rattled-v2v": Row(RATTLED, "v2v"),
    "more-labels": Row(MORE, teacher_labels=1),
    "rattled-labels": Row(RATTLED, teacher_labels=1),
    "both-labels": Row(f"{MORE}+rattled", teacher_labels=1),
    "more-labels-n2n": Row(MORE, "n2n", 1),
    "more-labels-v2v": Row(MORE, "v2v", 1),
    "rattled-labels-v2v": Row(RATTLED, "v2v", 1),
    "more-dft": Row("train+labelled"),
}


class UnfinishedError(Exception):
    """A run is not there, and none is to be trained."""


class Study:
    """Runs of one store in one folder; without ``trains`` only finished ones."""

    def __init__(self, store: Path, out: Path, trains: bool) -> None:
        self.out = out
        self._trains = trains
        self._common = ["--cache", str(store), "--config", str(CONFIG), "--threads=1"]

    def tuned(self, row: Row) -> dict[str, float]:
        """Weight of every term of ``row``, by the force error on ``val``."""
        return {term: self._best_weight(row.alone(term)) for term in row.terms}

    def result(self, row: Row, seed: int) -> dict[str, Any]:
        """Results of ``row`` on ``test``; trains where that is not done."""
        weights = self.tuned(row)
        told = "".join(f"-{weight:g}" for weight in weights.values())
        return self._trained(
            self.out / f"{row}{told}-s{seed}",
            [*row.arguments, *_weights(weights), "--set", "val_split=test"],
            seed,
        )

    def _best_weight(self, row: Row) -> float:
        errors = {}
        for weight in GRIDS[row.strategy]:
            arguments = [*row.arguments, *_weights({row.strategy: weight})]
            arguments += ["--set", "val_split=val", "--steps", str(TUNING_STEPS)]
            folder = self.out / "tuning" / f"{row}-{weight:g}"
            found = self._trained(folder, arguments, seed=0)
            errors[weight] = found["metrics"]["forces_mae"]
        return min(errors, key=lambda weight: errors[weight])

    def _trained(
        self, folder: Path, arguments: Sequence[str], seed: int
    ) -> dict[str, Any]:
        if not self._trains and not (folder / "metrics.json").exists():
            raise UnfinishedError
        failure = train(folder, [*self._common, *arguments, "--seed", str(seed)])
        if failure is not None:
            raise click.ClickException(failure)
        found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
        return found


def _weights(weights: dict[str, float]) -> list[str]:
    return [f"--set=distill.{term}={weight:g}" for term, weight in weights.items()]


def table(study: Study, results: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Lines of the table; errors on ``test`` as mean ± deviation over seeds."""
    yield HEAD
    yield "|---" * HEAD.count(" | ") + "|---|"
    for name, found in results.items():
        row = ROWS[name]
        weights = ", ".join(f"{w:g}" for w in study.tuned(row).values())
        terms = f"{row.strategy} ({weights})" if weights else "none"
        labels = f"{row.teacher_labels:g}" if row.teacher_labels else "no"
        errors = [_spread(found, key) for key in ("forces_mae", "energy_mae")]
        cells = [name, row.split, terms, labels, str(len(found)), *errors]
        yield "| " + " | ".join(cells) + " |"
    teacher = next(iter(results.values()))[0]["teacher_metrics"]
    errors = [f"{teacher[key]:.1f}" for key in ("forces_mae", "energy_mae")]
    yield "| " + " | ".join(["teacher", "", "", "", "", *errors]) + " |"


def _spread(found: Sequence[dict[str, Any]], key: str) -> str:
    values = [result["metrics"][key] for result in found]
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"


@click.command()
@click.argument("store", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rows", default=",".join(ROWS), help="Names of rows, with commas.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--show", is_flag=True, help="Train nothing.")
def main(store: Path, out: Path, rows: str, seeds: str, show: bool) -> None:
    """Train what is missing, one process at a time, and print the table."""
    study = Study(store, out, trains=not show)
    chosen = rows.split(",")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for seed in map(int, seeds.split(",")):
        for name in chosen:
            with suppress(UnfinishedError):
                results[name].append(study.result(ROWS[name], seed))
    finished = {name: found for name, found in results.items() if found}
    if not finished:
        raise click.ClickException("Nothing is finished yet.")
    text = "\n".join(table(study, finished)) + "\n"
    (out / "table.md").write_text(text)
    click.echo(text)


if __name__ == "__main__":
    main()
