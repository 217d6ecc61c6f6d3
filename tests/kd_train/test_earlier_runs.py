"""A store and runs made at commit 4d6d151 are read, trained on and resumed.

``tests/fixtures/runs/4d6d151.zip`` was written by the code of that commit. It holds a
store of 24 training and 8 validation samples, a run of 8 steps (``whole``), and the
same run stopped after step 4 (``half``). The configuration has the keys of that commit.
"""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from kd_train.cli.train import main, report_main
from kd_train.report.runs import read_run
from pipeline.store.verify import verify_store
from tests.commands import run_command

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "runs" / "4d6d151.zip"


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return folder


def test_the_store_is_sound_and_trains(earlier: Path, tmp_path: Path) -> None:
    assert verify_store(earlier / "store.zarr") == []
    config = earlier / "whole" / "config.yaml"
    arguments = ["--cache", earlier / "store.zarr", "--config", config]
    done = run_command(main, [*arguments, "--out", tmp_path / "run", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    # The weights differ by rounding on another processor, the losses hardly.
    ours = json.loads((tmp_path / "run" / "metrics.json").read_text())
    theirs = json.loads((earlier / "whole" / "metrics.json").read_text())
    assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-3, abs=1e-6)
    assert ours["fingerprint"] == theirs["fingerprint"]


def test_a_stopped_run_is_resumed(earlier: Path, tmp_path: Path) -> None:
    run = tmp_path / "half"
    shutil.copytree(earlier / "half", run)
    arguments = ["--cache", earlier / "store.zarr", "--out", run, "--resume"]
    config = ["--config", earlier / "half" / "config.yaml", "--device", "cpu"]
    done = run_command(main, [*arguments, *config])
    assert done.exit_code == 0, done.output
    ours = load_file(run / "student.safetensors")
    theirs = load_file(earlier / "whole" / "student.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=1e-5)


def test_reports_read_earlier_runs_beside_new_ones(
    earlier: Path, tmp_path: Path
) -> None:
    config = earlier / "whole" / "config.yaml"
    arguments = ["--cache", earlier / "store.zarr", "--config", config]
    plain = ["--strategy", "none", "--out", tmp_path / "none", "--device", "cpu"]
    assert run_command(main, [*arguments, *plain]).exit_code == 0
    runs = [tmp_path / "none", earlier / "whole"]
    done = run_command(report_main, [*runs, "--out", tmp_path / "report"])
    assert done.exit_code == 0, done.output
    assert "n2n+vanilla2" in done.stdout
    old, new = read_run(runs[1]).header, read_run(runs[0]).header
    assert old.initial_weights == new.initial_weights
