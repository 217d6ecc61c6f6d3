"""A sweep through Snakemake: killed, continued, extended, its failures told."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kd_train.sweep.grid import load_sweep
from kd_train.sweep.jobs import read_outcome, run_job
from kd_train.trainer.trainer import Trainer
from pipeline.files.atomic import sha256_of
from pipeline.store.reader import FeatureStore
from tests.stores import STUDENTS

pytest.importorskip("snakemake")
ROOT = Path(__file__).parents[2]
STUDENT = "painn-small-demo"
STEPS = 60
FAILING = f"{STUDENT}-n2n=1e+39-s0"
FINE = [f"{STUDENT}-none-s0", f"{STUDENT}-n2n=2-s0", f"{STUDENT}-vanilla2-s0"]

pytestmark = pytest.mark.workflow


@dataclass(frozen=True)
class Swept:
    """A finished sweep, and the steps at which its runs stood when it was killed."""

    file: Path
    steps_when_killed: dict[str, int]


def _document(store: FeatureStore, **changes: Any) -> dict[str, Any]:
    settings = {
        "student.hyperparameters": STUDENTS[STUDENT],
        "steps": STEPS,
        "batch_size": 8,
        "eval_every": 5,
        "schedule": {"kind": "cosine", "warmup_steps": 5},
        "ema_decay": 0.9,
    }
    return {
        "store": str(store.path),
        "out": "out",
        "settings": settings,
        "students": [STUDENT],
        "strategies": ["none", "n2n", "vanilla2"],
        # No float32 holds the loss with the second weight.
        "weights": {"n2n": [2, 1e39]},
    } | changes


def _write(path: Path, document: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(document))
    return path


def _start(file: Path, *more: str) -> "subprocess.Popen[str]":
    """Snakemake as a process group of its own; the lock would outlive its killing."""
    options = ["--cores", "2", "--nolock", "--directory", str(file.parent), "sweep"]
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        [*command, *options, "--config", f"sweep={file}", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PATH": path},
    )


def _finish(process: "subprocess.Popen[str]") -> str:
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return said


def _steps(out: Path) -> dict[str, int]:
    """Last saved step of every run that has a checkpoint."""
    found = {}
    for path in out.glob("runs/*/last.pt"):
        with (path.parent / "metrics.csv").open(newline="") as stream:
            found[path.parent.name] = int(list(csv.DictReader(stream))[-1]["step"])
    return found


@pytest.fixture(scope="module")
def swept(small_store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    folder = tmp_path_factory.mktemp("sweep")
    file = _write(folder / "sweep.yaml", _document(small_store))
    out = folder / "out"
    killed_at: dict[str, int] = {}
    while not any(step < STEPS for step in killed_at.values()):
        # Again where the runs were faster than this process looked.
        shutil.rmtree(out, ignore_errors=True)
        killed_at = _killed_at(file, out)
    assert not list(out.glob("report/*"))
    _finish(_start(file))
    return Swept(file, killed_at)


def _killed_at(file: Path, out: Path) -> dict[str, int]:
    """Kill a sweep once a run has a checkpoint; where its runs stand then."""
    process = _start(file)
    while process.poll() is None and not _steps(out):
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return _steps(out)


def test_killed_and_resumed_runs_are_those_of_an_undisturbed_sweep(
    swept: Swept, small_store: FeatureStore, tmp_path: Path
) -> None:
    assert any(step < STEPS for step in swept.steps_when_killed.values())
    sweep = load_sweep(swept.file)
    assert {run.name for run in sweep.runs} == {FAILING, *FINE}
    for name in FINE:
        config = sweep.run(name).config
        straight = Trainer(config, small_store, tmp_path / name, torch.device("cpu"))
        straight.train(resume=False)
        digests = [
            sha256_of(folder / "student.safetensors")
            for folder in (tmp_path / name, sweep.folder(name))
        ]
        assert digests[0] == digests[1], name
    for name, step in swept.steps_when_killed.items():
        log = (sweep.folder(name) / "train.log").read_text()
        assert f"resumed {sweep.folder(name)} at step {step}" in log


def test_one_failure_is_told_and_not_fatal(swept: Swept) -> None:
    sweep = load_sweep(swept.file)
    for name in FINE:
        outcome = read_outcome(sweep, name)
        assert outcome is not None
        assert (outcome.state, outcome.error, outcome.step) == ("done", None, STEPS)
        assert not (sweep.folder(name) / "failure.json").exists()
    failure = json.loads((sweep.folder(FAILING) / "failure.json").read_text())
    assert failure["step"] is None
    assert "the training loss is no longer finite at step 5" in failure["error"]
    report = (sweep.out / "report" / "sweep.txt").read_text()
    assert "4 runs, 3 done, 1 failed" in report
    assert f"{sweep.folder(FAILING)}: failed: {failure['error']}" in report
    with (sweep.out / "report" / "table.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    found = {row["strategy"]: row["forces_mae"] for row in rows}
    assert found.keys() == {"none", "n2n", "vanilla2", "teacher"}
    for name in FINE:
        summary = json.loads((sweep.folder(name) / "metrics.json").read_text())
        shown = float(found[sweep.run(name).strategy])
        assert shown == summary["metrics"]["forces_mae"]


def _due(said: str) -> set[str]:
    """Runs that a dry run would train."""
    lines = [line.strip() for line in said.splitlines()]
    return {
        line.split("run=")[1] for line in lines if line.startswith("wildcards: run=")
    }


def test_only_what_is_new_changed_or_asked_for_is_due(
    swept: Swept, small_store: FeatureStore
) -> None:
    settings = _document(small_store)["settings"] | {"steps": STEPS + 1}
    changes: dict[str, dict[str, Any]] = {
        "seed": {"seeds": [0, 3]},
        "steps": {"settings": settings},
    }
    files = {
        name: _write(
            swept.file.parent / f"{name}.yaml", _document(small_store, **change)
        )
        for name, change in changes.items()
    }
    asked = {
        "same": [swept.file],
        "seed": [files["seed"], "retry_failed=true"],
        "steps": [files["steps"]],
    }
    started = {}
    for name, (file, *more) in asked.items():
        started[name] = _start(file, *more, "--dry-run")
    said = {name: _finish(process) for name, process in started.items()}
    assert _due(said["same"]) == set()
    assert "Nothing to be done" in said["same"]
    new = {f"{STUDENT}-{s}-s3" for s in ("none", "n2n=2", "n2n=1e+39", "vanilla2")}
    assert _due(said["seed"]) == {FAILING, *new}
    assert _due(said["steps"]) == {FAILING, *FINE}


def test_changed_settings_of_a_trained_run_are_refused(
    swept: Swept, small_store: FeatureStore
) -> None:
    settings = _document(small_store)["settings"] | {"batch_size": 9}
    file = swept.file.parent / "changed.yaml"
    changed = load_sweep(_write(file, _document(small_store, settings=settings)))
    before = sha256_of(changed.folder(FINE[0]) / "student.safetensors")
    outcome = run_job(changed, FINE[0])
    assert outcome.state == "failed"
    assert "batch_size = 8, but now it is 9" in str(outcome.error)
    assert sha256_of(changed.folder(FINE[0]) / "student.safetensors") == before


def test_gpus_are_counted_and_never_replaced_by_the_cpu(
    small_store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody said how many there are; the two of the environment are not there."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "64,65")
    document = _document(small_store, strategies=["none"], weights={}, gpus=1)
    file = _write(tmp_path / "sweep.yaml", document)
    said = _finish(_start(file))
    assert re.search(r"Provided resources: gpu=\D*2\b", said), said
    outcome = read_outcome(load_sweep(file), FINE[0])
    assert outcome is not None
    assert (outcome.state, outcome.step) == ("failed", None)
    assert "--device 'cuda' cannot be used" in str(outcome.error)
    report = (tmp_path / "out" / "report" / "sweep.txt").read_text()
    assert "1 runs, 1 failed" in report


def test_a_sweep_without_its_file_is_one_sentence() -> None:
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--cores", "1", "sweep"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "--config sweep=FILE" in done.stdout + done.stderr
