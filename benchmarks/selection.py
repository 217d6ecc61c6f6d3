"""What a choice of samples to label is worth: farthest points, leverage and random.

    export KD_DATA=... PYTHONPATH=benchmarks/teachers OMP_NUM_THREADS=1
    kd-cache build benchmarks/specs/ethanol.yaml
    python benchmarks/selection.py benchmarks/specs/ethanol.yaml results/selection

The split ``--pool`` of the store of SPEC has labels and ``node_features``. From it,
`kd-cache select` chooses each budget by each method with each seed. A store of the
chosen samples and of the split ``--test`` is built without a teacher, so that students
learn from labels alone. All students have the same steps and, by seed, the same initial
weights. The last columns are the mean and the largest distance of a sample of the pool
to the nearest chosen one.

Finished runs are kept and interrupted ones continued, so the command may be killed and
repeated. With ``--show`` nothing is trained, and the table is of what is finished.
(The name of this file is not ``select``, since Python has a module of that name.)
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import yaml
from compare import train

from pipeline.build.build import build_store
from pipeline.build.choose_points import METHODS, Method
from pipeline.build.select_samples import Wish, select_samples
from pipeline.spec.cache_spec import CacheSpec, load_spec

CONFIG = Path(__file__).parent / "specs" / "ethanol_student.yaml"
COLUMNS = {
    "forces_mae": "force MAE, meV/Å",
    "energy_mae": "energy MAE, meV",
    "mean_distance": "mean distance",
    "largest_distance": "largest distance",
}
DIGITS = {"forces_mae": 1, "energy_mae": 1}


@dataclass(frozen=True)
class Study:
    """Choices from a split of the store of ``spec``, and their students in ``out``."""

    spec: CacheSpec
    out: Path
    pool: str
    test: str
    options: tuple[str, ...]
    trains: bool

    def result(self, method: Method, budget: int, seed: int) -> dict[str, float] | None:
        """Return errors and distances; None if the run is not there and none starts."""
        name = f"{method}-{budget}-s{seed}"
        run = self.out / "runs" / name
        if self.trains and not (run / "metrics.json").exists():
            ids = self._choose(name, Wish(self.pool, budget, method, seed))
            self._train(run, self._label(name, ids), seed)
        if not (run / "metrics.json").exists():
            return None
        metrics = json.loads((run / "metrics.json").read_text())["metrics"]
        chosen = json.loads((self.out / "ids" / f"{name}.json").read_text())
        return {key: (metrics | chosen)[key] for key in COLUMNS}

    def _choose(self, name: str, wish: Wish) -> Path:
        ids = self.out / "ids" / f"{name}.txt"
        described = ids.with_suffix(".json")
        if not described.exists():
            found = select_samples(self.spec.store.path, wish, ids)
            described.write_text(json.dumps(found, indent=2))
        return ids

    def _label(self, name: str, ids: Path) -> Path:
        """Return the store of the chosen samples, with labels and without a teacher."""
        sections = {
            split: self.spec.splits[old].model_dump(exclude_defaults=True)
            for split, old in (("train", self.pool), (self.test, self.test))
        }
        sections["train"] |= {"ids": str(ids.resolve())}
        store = self.out.resolve() / "stores" / f"{name}.zarr"
        document = {"splits": sections, "store": {"path": str(store)}}
        file = store.with_suffix(".yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(document))
        build_store(load_spec(file))
        return store

    def _train(self, run: Path, store: Path, seed: int) -> None:
        arguments = ["--cache", str(store), "--strategy", "none", "--threads=1"]
        arguments += ["--set", f"val_split={self.test}", "--seed", str(seed)]
        failure = train(run, [*arguments, *self.options])
        if failure is not None:
            raise click.ClickException(failure)


Results = dict[tuple[int, Method], list[dict[str, float]]]


def table(results: Results) -> Iterator[str]:
    """Yield lines of the table, mean ± deviation over seeds."""
    yield f"| labelled | choice | seeds | {' | '.join(COLUMNS.values())} |"
    yield "|---" * (3 + len(COLUMNS)) + "|"
    for (budget, method), found in results.items():
        cells = [str(budget), method, str(len(found))]
        cells += [_spread([one[key] for one in found], key) for key in COLUMNS]
        yield "| " + " | ".join(cells) + " |"


def _spread(values: Sequence[float], key: str) -> str:
    digits = DIGITS.get(key, 3)
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def _numbers(context: Any, option: Any, text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


@click.command()
@click.argument("spec", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--pool", default="labelled", show_default=True)
@click.option("--test", default="test", show_default=True)
@click.option("--budgets", default="50,100", show_default=True, callback=_numbers)
@click.option("--methods", default=",".join(METHODS), show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True, callback=_numbers)
@click.option("--config", default=str(CONFIG), type=click.Path(exists=True))
@click.option("--set", "overrides", multiple=True, help="Passed on to kd-train.")
@click.option("--show", is_flag=True, help="Train nothing.")
def main(
    spec: Path,
    out: Path,
    pool: str,
    test: str,
    budgets: list[int],
    methods: str,
    seeds: list[int],
    config: str,
    overrides: tuple[str, ...],
    show: bool,
) -> None:
    """Train what is missing, one process at a time, and print the table."""
    more = [f"--set={change}" for change in overrides]
    options = ("--config", config, *more)
    study = Study(load_spec(spec), out, pool, test, options, trains=not show)
    results: Results = {}
    for seed, budget, method in product(seeds, budgets, methods.split(",")):
        found = study.result(method, budget, seed)  # type: ignore[arg-type]
        if found is not None:
            results.setdefault((budget, method), []).append(found)  # type: ignore[arg-type]
    if not results:
        raise click.ClickException("Nothing is finished yet.")
    text = "\n".join(table(results)) + "\n"
    (out / "table.md").write_text(text)
    click.echo(text)


if __name__ == "__main__":
    main()
