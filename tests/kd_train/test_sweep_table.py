"""The table of a sweep: weights and variants are told apart, nothing is left unsaid."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml

from kd_train.sweep.cli import main
from kd_train.sweep.grid import load_sweep
from kd_train.sweep.jobs import JobResult, record
from kd_train.trainer.trainer import Trainer
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
        Trainer(config, small_store, folder, torch.device("cpu")).train(resume=False)
        record(sweep, name, JobResult(state="done", step=3))
    record(sweep, _name(FAILED), JobResult(state="failed", error="It broke.", step=2))
    return path


@pytest.fixture(scope="module")
def said(file: Path) -> str:
    """What the report says on the terminal."""
    return run_command(main, ["report", file]).stdout


def test_one_table_of_everything(file: Path, said: str) -> None:
    folder = file.parent / "out" / "report"
    assert (folder / "sweep.txt").read_text() == said
    assert said.startswith("sweep.yaml: 8 runs, 5 done, 1 failed, 2 waiting\n")
    runs = file.parent / "out" / "runs"
    assert f"{runs / _name(FAILED)}: failed at step 2: It broke.\n" in said
    for name in map(_name, WAITING):
        assert f"{runs / name}: not started\n" in said
    with (folder / "table.csv").open(newline="") as stream:
        rows = [r for r in csv.DictReader(stream) if r["strategy"] != "teacher"]
    expected = {}
    for name in TRAINED:
        metrics = json.loads((runs / _name(name) / "metrics.json").read_text())
        expected[metrics["metrics"]["forces_mae"]] = name.split("=")[0].split("-")[0]
    assert len(expected) == len(TRAINED)
    assert {float(row["forces_mae"]): row["strategy"] for row in rows} == expected
    assert (folder / "report.html").exists()


def test_results_of_other_settings_are_not_in_the_table(file: Path, said: str) -> None:
    """A finished run whose settings were changed has failed, though it has results."""
    sweep, name = load_sweep(file), _name(TRAINED[2])
    assert "Refused" not in said
    record(sweep, name, JobResult(state="failed", error="It was started otherwise."))
    later = run_command(main, ["report", file]).stdout
    record(sweep, name, JobResult(state="done", step=3))
    assert f"Refused:\n  {name}: It was started otherwise.\n" in later
    assert len((file.parent / "out/report/table.csv").read_text().splitlines()) == 7


def test_a_run_that_stopped_early_is_told_beside_the_table(file: Path) -> None:
    """As runs did that had the patience that a sweep now refuses."""
    folder = load_sweep(file).folder(_name(TRAINED[3]))
    before = (folder / "metrics.json").read_text()
    document = json.loads(before) | {"steps": 2}
    (folder / "metrics.json").write_text(json.dumps(document))
    said = run_command(main, ["report", file]).stdout
    (folder / "metrics.json").write_text(before)
    plain = load_sweep(file).folder(_name(TRAINED[0]))
    assert f"  {folder}: unlike {plain}: different steps (2 and 3)\n" in said
    assert len((file.parent / "out/report/table.csv").read_text().splitlines()) == 7


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
