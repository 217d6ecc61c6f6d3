"""Warnings of stage two: on standard error and in the log of the run, once each."""

import shutil
from pathlib import Path

from kd_train.cli.evaluate import eval_main
from kd_train.cli.train import main as train_main
from pipeline.store.reader import FeatureStore
from tests.commands import run_command
from tests.frames import collision_frames, frame, write_frames


def _logged(log: Path) -> list[str]:
    lines = log.read_text().splitlines()
    return [s.split(" WARNING ", 1)[1] for s in lines if " WARNING " in s]


def _warned(text: str) -> list[str]:
    lines = text.splitlines()
    return [s.removeprefix("Warning: ") for s in lines if s.startswith("Warning: ")]


def test_training_warns_in_its_log_from_the_start(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    """Of what is chosen before the run has a folder, too."""
    sizes = {"hidden_channels": 8, "num_filters": 8, "num_interactions": 1}
    settings = {f"student.hyperparameters.{name}": size for name, size in sizes.items()}
    # Its recipe is of periodic structures, and these are not.
    words = ["--cache", small_store.path, "--student", "schnet-oc20", "--steps", 1]
    flags = [w for key, value in settings.items() for w in ("--set", f"{key}={value}")]
    place = ["--device", "cpu", "--out", tmp_path / "run"]
    said = run_command(train_main, [*words, *flags, *place])
    assert said.exit_code == 0, said.output
    told = _warned(said.stderr)
    assert any("selects the recipe oc20" in line for line in told)
    assert len(set(told)) == len(told)
    assert _logged(tmp_path / "run" / "train.log") == told


def test_evaluation_warns_of_atoms_too_close(finished: Path, tmp_path: Path) -> None:
    """A12: in a dataset that no store was planned of; the first such sample."""
    symbols, places = ["C", "H", "O"], [[0, 0, 0], [0, 0, 0.1], [1.2, 0, 0]]
    bad = [
        frame(name, symbols, places, energy=-100.0, forces=[[0.1, 0, 0]] * 3)
        for name in ("bad", "worse")
    ]
    data = write_frames(tmp_path / "d.extxyz", [*collision_frames(3), *bad])
    words = [finished, "--data", data, "--out", tmp_path / "out", "--device", "cpu"]
    said = run_command(eval_main, words)
    assert said.exit_code == 0, said.output
    told = _warned(said.stderr)
    close = [line for line in told if "Å apart" in line]
    assert len(close) == 1
    assert close[0].startswith(f"{data}: Sample 'bad': atoms 0 (C) and 1 (H)")
    assert _logged(tmp_path / "out" / "eval.log") == told


def test_evaluation_leaves_a_run_as_it_is_where_all_is_well(
    finished: Path, small_store: FeatureStore, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    # Other tests may have evaluated the same run before.
    log = run / "eval.log"
    log.unlink(missing_ok=True)
    before = sorted(run.rglob("*"))
    words = [run, "--data", small_store.path, "--split", "val", "--device", "cpu"]
    said = run_command(eval_main, words)
    assert log.exists() == bool(_warned(said.stderr))
    assert sorted(p for p in run.rglob("*") if p != log) == before
