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


def test_one_report_of_everything(file: Path, said: str) -> None:
    folder = file.parent / "out" / "report"
    assert (folder / "sweep.txt").read_text() == said
    assert said.startswith("sweep.yaml: 8 runs, 5 done, 1 failed, 2 waiting\n")
    failed = file.parent / "out" / "runs" / _name(FAILED)
    assert f"  {failed}: failed at step 2: It broke.\n" in said
    assert f"Waiting:\n  {_name(WAITING[0])}\n  {_name(WAITING[1])}\n" in said
    with (folder / "table.csv").open(newline="") as stream:
        rows = [r for r in csv.DictReader(stream) if r["strategy"] != "teacher"]
    found = {float(row["forces_mae"]): row["strategy"] for row in rows}
    assert len(rows) == len(TRAINED)
    for name in TRAINED:
        summary = file.parent / "out" / "runs" / _name(name) / "metrics.json"
        metrics = json.loads(summary.read_text())["metrics"]
        assert found[metrics["forces_mae"]] == name.split("-")[0].split("=")[0]
    page = (folder / "report.html").read_text()
    for name in (*TRAINED, FAILED):
        assert f"/runs/{_name(name)}<" in page


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
