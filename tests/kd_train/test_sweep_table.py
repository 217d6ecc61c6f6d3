"""The table of a sweep: weights and variants are told apart, nothing is left unsaid."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml

from kd_train.loop import Run
from kd_train.sweep.cli import main
from kd_train.sweep.grid import load_sweep
from kd_train.sweep.jobs import Outcome, record
from pipeline.store.reader import FeatureStore
from tests.commands import run_command
from tests.stores import STUDENTS

STUDENT = "painn-small-demo"
TRAINED = ("none-s0", "none-slow-s0", "n2n=5-even-s0", "n2n=7-even-s0", "n2n=5-slow-s0")
FAILED, WAITING = "n2n=7-slow-s0", ("vanilla2-even-s0", "vanilla2-slow-s0")


def _name(rest: str) -> str:
    return f"{STUDENT}-{rest}"


@pytest.fixture(scope="module")
def file(small_store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two variants, one of which has a plain student of its own."""
    settings = {
        "student.hyperparameters": STUDENTS[STUDENT],
        "steps": 3,
        "batch_size": 16,
        "eval_every": 3,
    }
    path = tmp_path_factory.mktemp("table") / "sweep.yaml"
    document = {
        "store": str(small_store.path),
        "out": "out",
        "settings": settings,
        "students": [STUDENT],
        "strategies": ["none", "n2n", "vanilla2"],
        "weights": {"n2n": [5, 7]},
        "variants": {"even": {}, "slow": {"optimizer.lr": 1e-4}},
    }
    path.write_text(yaml.safe_dump(document))
    sweep = load_sweep(path)
    for name in map(_name, TRAINED):
        config, folder = sweep.run(name).config, sweep.folder(name)
        Run(config, small_store, folder, torch.device("cpu")).train(resume=False)
        record(sweep, name, Outcome(state="done", step=3))
    record(sweep, _name(FAILED), Outcome(state="failed", error="It broke.", step=2))
    return path


@pytest.fixture(scope="module")
def said(file: Path) -> str:
    """What the report says on the terminal."""
    return run_command(main, ["report", file]).stdout


def test_one_table_of_everything(file: Path, said: str) -> None:
    folder = file.parent / "out" / "report"
    assert (folder / "sweep.txt").read_text() == said
    assert said.startswith("sweep.yaml: 8 runs, 5 done, 1 failed, 2 waiting\n")
    assert f"Failed:\n  {_name(FAILED)} after step 2: It broke.\n" in said
    assert f"Waiting:\n  {_name(WAITING[0])}\n  {_name(WAITING[1])}\n" in said
    with (folder / "sweep.csv").open(newline="") as stream:
        rows = [r for r in csv.DictReader(stream) if r["strategy"] != "teacher"]
    where = [(row["student"], row["strategy"]) for row in rows]
    assert where == [
        (STUDENT, "none"),
        (STUDENT, "n2n=5 even"),
        (STUDENT, "n2n=7 even"),
        (f"{STUDENT} slow", "none"),
        (f"{STUDENT} slow", "n2n=5"),
    ]
    order = ("none-s0", "n2n=5-even-s0", "n2n=7-even-s0", "none-slow-s0", TRAINED[-1])
    for name, row in zip(map(_name, order), rows, strict=True):
        summary = file.parent / "out" / "runs" / name / "metrics.json"
        metrics = json.loads(summary.read_text())["metrics"]
        assert float(row["forces_mae"]) == metrics["forces_mae"]


def test_a_page_for_all_that_one_can_compare(file: Path, said: str) -> None:
    assert said
    pages = {
        path.parent.name: path.read_text()
        for path in (file.parent / "out" / "report").glob("*/report.html")
    }
    names = {
        "even_n2n=5": ("none-s0", "n2n=5-even-s0"),
        "even_n2n=7": ("none-s0", "n2n=7-even-s0"),
        "slow_n2n=5": ("none-slow-s0", "n2n=5-slow-s0"),
    }
    assert pages.keys() == names.keys()
    for page, runs in names.items():
        found = [n for n in TRAINED if f"/runs/{_name(n)}<" in pages[page]]
        assert sorted(found) == sorted(runs)


def test_the_list_tells_how_far_runs_are(file: Path) -> None:
    sweep = load_sweep(file)
    half = sweep.folder(_name(WAITING[1]))
    half.mkdir(parents=True, exist_ok=True)
    (half / "metrics.csv").write_text("step,loss\n1,3\n2,2\n")
    said = run_command(main, ["list", file]).stdout
    lines = dict(line.split(maxsplit=1) for line in said.splitlines())
    assert lines == {
        **dict.fromkeys(map(_name, TRAINED), "done"),
        _name(FAILED): "failed: It broke.",
        _name(WAITING[0]): "waiting",
        _name(WAITING[1]): "at step 2",
    }
    (half / "metrics.csv").unlink()
