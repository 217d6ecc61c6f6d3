"""What closes the gap: features, generated structures, force Jacobians (a table).

    export KD_DATA=... PYTHONPATH=benchmarks/teachers OMP_NUM_THREADS=1
    kd-cache build benchmarks/specs/signals/ethanol.yaml
    python benchmarks/signals.py ethanol caches/signals/ethanol.zarr results/ethanol

Every row of a table has the same number of steps, batches of the same size and, by
seed, the same initial weights; plain students see the labelled split alone. Errors are
those of the reference's labels on each test split. Finished runs are kept and
interrupted runs continue, so the command may be killed and repeated. ``--rows`` and
``--seeds`` choose; several processes may work in one folder. With ``--show`` nothing is
trained, and the table is of what is finished. Writes ``table.md`` and ``table.json``.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
from compare import train
from filelock import FileLock, Timeout

SPECS = Path(__file__).parent / "specs" / "signals"


@dataclass(frozen=True)
class Row:
    """What a student is trained on: splits, terms and settings."""

    split: str = "train"
    strategy: str = "none"
    settings: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """Options of ``kd-train`` for the row."""
        settings = [f"train_split={self.split}", *self.settings]
        if self.split != "train":
            settings.append("loss.pseudo_label_weight=1")
        return ["--strategy", self.strategy, *(f"--set={s}" for s in settings)]


@dataclass(frozen=True)
class Study:
    """Rows of a data set; ``tests`` are its test splits, ``steps`` those of a run."""

    rows: Mapping[str, Row]
    tests: tuple[str, ...]
    steps: int
    settings: tuple[str, ...] = ()


def _copies(name: str, **more: Any) -> Row:
    return Row(f"train+{name}", **more)


def _jacobian(columns: int, *more: str) -> Row:
    return Row("train", "jacobian", (f"jacobian.columns={columns}", *more))


# Weights of features that validation chose for ethanol: the smallest of the grid.
_N2N, _V2V = ("distill.n2n=1",), ("distill.v2v=10",)
_MOLECULE = {
    "plain": Row(),
    "n2n": Row(strategy="n2n", settings=_N2N),
    "v2v": Row(strategy="v2v", settings=_V2V),
    "vanilla2": Row(strategy="vanilla2"),
    "rattle x8": _copies("rattle8"),
    "modes x8": _copies("modes8"),
    "modes x54": _copies("modes54"),
    "md x8": _copies("md8"),
    "jacobian k=4": _jacobian(4),
    "modes x8 + vanilla2": _copies("modes8", strategy="vanilla2"),
    "modes x8 + vanilla2 + jacobian": _copies("modes8", strategy="vanilla2+jacobian"),
    "modes x54 + vanilla2": _copies("modes54", strategy="vanilla2"),
    "modes x54 + vanilla2 + jacobian": _copies("modes54", strategy="vanilla2+jacobian"),
}
_ETHANOL = {
    **_MOLECULE,
    "walk x8": _copies("walk8"),
    "jacobian k=27": _jacobian(27),
    "modes x54 + jacobian": _copies("modes54", strategy="jacobian"),
    "rattle x26": _copies("rattle26"),
    "rattle x54": _copies("rattle54"),
    "modes x26": _copies("modes26"),
    "jacobian k=13": _jacobian(13),
    **{f"vanilla2 λ={w:g}": Row("train", "vanilla2", (f"distill.vanilla2={w:g}",))
       for w in (10, 1000)},
    **{f"jacobian k=27 λ={w:g}": _jacobian(27, f"distill.jacobian={w:g}")
       for w in (5, 500)},
}  # fmt: skip
_GRADIENT = ("student.hyperparameters={direct_forces: false}",)
_PERIODIC = {
    "plain": Row(),
    "rattle x8": _copies("rattle8"),
    "md x8": _copies("md8"),
    "jacobian k=4": _jacobian(4),
}
# A crystal has far more neighbours than a molecule; these settings bound the price.
_BULK = (
    "batch_size=4",
    "student.hyperparameters={cutoff: 5.0, max_neighbors: 30}",
)
STUDIES = {
    "ethanol": Study(_ETHANOL, ("test",), 6000),
    "ethanol-gradient": Study(
        {n: _ETHANOL[n] for n in ("plain", "modes x8", "modes x54", "jacobian k=27")},
        ("test",),
        6000,
        _GRADIENT,
    ),
    "acac": Study(_MOLECULE, ("test", "hot"), 6000),
    "3bpa": Study(_MOLECULE, ("test", "hot"), 6000),
    "silicon": Study(_PERIODIC, ("test",), 2000, _BULK),
}


class Runs:
    """The runs of a study in one folder."""

    def __init__(self, study: Study, store: Path, out: Path) -> None:
        self.study = study
        self.out = out
        self._common = [
            *("--store", str(store), "--config", str(SPECS / "student.yaml")),
            *("--threads", "1", "--set", "val_split=val"),
            *(f"--set={setting}" for setting in study.settings),
            *("--set", "test_split=" + "+".join(study.tests)),
        ]

    def folder(self, row: str, seed: int) -> Path:
        """Return the folder of a run."""
        return self.out / f"{row.replace(' ', '_').replace('+', 'and')}-s{seed}"

    def train(self, row: str, seed: int, steps: int) -> None:
        """Train the run unless it is finished or another process has it."""
        folder = self.folder(row, seed)
        self.out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return
        with lock:
            options = [*self._common, *self.study.rows[row].arguments]
            options += ["--seed", str(seed), "--steps", str(steps)]
            failure = train(folder, options)
            if failure is not None:
                raise click.ClickException(failure)

    def results(self, row: str) -> dict[int, dict[str, Any]]:
        """Return ``metrics.json`` of the finished runs of a row by seed."""
        found = {}
        for seed in range(10):
            path = self.folder(row, seed) / "metrics.json"
            if path.exists():
                found[seed] = json.loads(path.read_text())
        return found


def summarise(runs: Runs) -> dict[str, Any]:
    """Return errors of each row and test split: values by seed, and the gap closed."""
    plain = runs.results("plain")
    document: dict[str, Any] = {}
    for row in runs.study.rows:
        found = runs.results(row)
        if not found:
            continue
        entry: dict[str, Any] = {"seeds": sorted(found), "tests": {}}
        for test in runs.study.tests:
            entry["tests"][test] = {
                key: _compare(found, plain, test, key)
                for key in ("energy_mae", "forces_mae")
            }
        document[row] = entry
    return document


def _compare(
    found: Mapping[int, Mapping[str, Any]],
    plain: Mapping[int, Mapping[str, Any]],
    test: str,
    key: str,
) -> dict[str, Any]:
    values = {
        seed: _part(result, test)["metrics"][key] for seed, result in found.items()
    }
    teacher = next(iter(found.values()))
    best = (_part(teacher, test)["teacher_metrics"] or {}).get(key)
    base = {s: _part(r, test)["metrics"][key] for s, r in plain.items() if s in values}
    ratio = [values[s] / base[s] for s in base]
    gap = [(base[s] - values[s]) / (base[s] - best) for s in base] if best else []
    return {"values": values, "teacher": best, "ratio": ratio, "gap": gap}


def _part(result: Mapping[str, Any], test: str) -> Mapping[str, Any]:
    """Return the metrics of one test split; of a single split they are the result's."""
    parts = result.get("test_splits") or {}
    part: Mapping[str, Any] = parts.get(test, result)
    return part


def table(document: Mapping[str, Any], tests: tuple[str, ...]) -> Iterator[str]:
    """Yield the lines of a Markdown table: means ± deviation over seeds."""
    head = ["row", "seeds"]
    for test in tests:
        head += [f"{test}: energy, meV", "forces, meV/Å", "E / plain", "F / plain"]
        head += ["E gap", "F gap"]
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for row, entry in document.items():
        cells = [row, str(len(entry["seeds"]))]
        for test in tests:
            both = [entry["tests"][test][k] for k in ("energy_mae", "forces_mae")]
            cells += [_spread([*part["values"].values()]) for part in both]
            cells += [f"{mean(p['ratio']):.2f}" if p["ratio"] else "–" for p in both]
            cells += [f"{mean(p['gap']):.0%}" if p["gap"] else "–" for p in both]
        yield "| " + " | ".join(cells) + " |"
    first = next(iter(document.values()))
    cells = ["teacher", ""]
    for test in tests:
        for key in ("energy_mae", "forces_mae"):
            best = first["tests"][test][key]["teacher"]
            cells.append("–" if best is None else f"{best:.1f}")
        cells += [""] * 4
    yield "| " + " | ".join(cells) + " |"


def _spread(values: list[float]) -> str:
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{deviation}"


@click.command()
@click.argument("study", type=click.Choice(list(STUDIES)))
@click.argument("store", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rows", help="Names of rows, with commas (default: all).")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--steps", type=int, help="Steps of a run (default: the study's).")
@click.option("--show", is_flag=True, help="Train nothing.")
def main(
    study: str,
    store: Path,
    out: Path,
    rows: str | None,
    seeds: str,
    steps: int | None,
    show: bool,
) -> None:
    """Train what is missing, one run at a time, and print the table."""
    chosen = STUDIES[study]
    runs = Runs(chosen, store, out)
    names = list(chosen.rows) if rows is None else rows.split(",")
    for seed in map(int, seeds.split(",")):
        for name in names:
            if not show:
                runs.train(name, seed, steps or chosen.steps)
    document = summarise(runs)
    if not document:
        raise click.ClickException("Nothing is finished yet.")
    text = "\n".join(table(document, chosen.tests)) + "\n"
    (out / "table.md").write_text(text)
    (out / "table.json").write_text(json.dumps(document, indent=2) + "\n")
    click.echo(text)


if __name__ == "__main__":
    main()
