"""Errors of a stored teacher on every split, and `kd-cache info` that prints them."""

import json
import shutil
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest

from kd_train.evaluation.evaluate import teacher_metrics
from pipeline.cli.main import main
from pipeline.fields import FIELDS
from pipeline.store.describe import describe_store
from pipeline.store.reader import FeatureStore
from pipeline.store.teacher_error import (
    MEASURED_SAMPLES,
    TeacherError,
    measure_teacher,
    spread_labelled,
    unlike_errors,
    warn_of_unlike,
)
from tests.commands import run_command


class Energies:
    """A split of energies alone."""

    def __init__(self, values: list[float]) -> None:
        self.values = np.array(values)

    def __len__(self) -> int:
        return len(self.values)

    def read(self, positions, paths):
        assert list(paths) == [FIELDS["energy"].path]
        return {FIELDS["energy"].path: self.values[positions]}


def test_positions_are_labelled_distinct_and_spread() -> None:
    values = [nan if i % 10 == 0 else 1.0 for i in range(5000)]
    found = spread_labelled(Energies(values))
    assert len(found) == len(set(found.tolist())) == MEASURED_SAMPLES
    assert np.isfinite(np.array(values)[found]).all()
    assert np.diff(found).max() <= 4
    assert found[-1] > 4990
    assert spread_labelled(Energies([nan, 1.0, nan, 2.0])).tolist() == [1, 3]
    # Forces may be the only labels.
    assert spread_labelled(Energies([nan] * 3)).tolist() == [0, 1, 2]
    assert spread_labelled(Energies([])).tolist() == []


def test_errors_are_those_of_an_evaluation(small_store: FeatureStore) -> None:
    told = json.loads(run_command(main, ["info", small_store.path, "--json"]).stdout)
    text = run_command(main, ["info", small_store.path]).stdout
    for name, split in small_store.splits.items():
        expected = teacher_metrics(split)
        assert expected is not None
        found = told["teacher_errors"][name]
        assert found["samples"] == len(split)
        for key in ("energy_mae", "forces_mae"):
            assert found[key] == pytest.approx(expected[key])
        line = (
            f"error        of the teacher, {name}: energy MAE "
            f"{expected['energy_mae']:.1f} meV, force MAE "
            f"{expected['forces_mae']:.1f} meV/Å ({len(split)} samples)"
        )
        assert line in text.splitlines()
    assert told["teacher_warning"] is None


def test_nothing_to_compare_is_left_out(labels_store: FeatureStore) -> None:
    assert describe_store(labels_store.path)["teacher_errors"] == {}
    assert "of the teacher" not in run_command(main, ["info", labels_store.path]).stdout


def test_a_store_at_a_url_is_not_read_for_it(small_store: FeatureStore) -> None:
    found = describe_store(f"file://{small_store.path}")
    assert found["teacher_errors"] == {}
    assert found["splits"]["train"]["samples"] == len(small_store.splits["train"])


def test_damaged_data_do_not_hide_the_description(
    small_store: FeatureStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "s.zarr"
    shutil.copytree(small_store.path, store)
    for shard in (store / "train" / "teacher" / "forces" / "c").rglob("*"):
        if shard.is_file():
            shard.write_bytes(b"\xff" * shard.stat().st_size)
    found = describe_store(store)
    assert found["teacher_errors"].keys() == {"val"}
    assert found["splits"]["train"]["samples"] == 160
    assert "train/teacher/forces" in caplog.text


def test_a_factor_of_more_than_two_is_warned_of() -> None:
    memorised = unlike_errors(("train", 22.21), ("test", 76.04))
    assert memorised == (
        "The teacher's force error is 22.2 meV/Å on train and 76 on test. Distilling "
        "on frames that a teacher has memorised says little."
    )
    other = unlike_errors(("hot", 90.0), ("test", 30.0))
    assert other is not None
    assert other.endswith("The structures of the two splits differ in kind.")
    assert unlike_errors(("train", 0.0), ("test", 1.0)) is not None
    for pair in ((10.0, 20.0), (20.0, 10.0), (0.0, 0.0), (nan, 9.0), (1.0, nan)):
        assert unlike_errors(("train", pair[0]), ("test", pair[1])) is None


def test_the_warning_names_the_split_that_differs_most() -> None:
    def errors(**forces: float) -> dict[str, TeacherError]:
        return {name: TeacherError(9, 1.0, value) for name, value in forces.items()}

    found = warn_of_unlike(errors(val=50.0, test=76.0, train=20.0, bare=nan))
    assert found is not None
    assert "20 meV/Å on train and 76 on test" in found
    found = warn_of_unlike(errors(first=5.0, second=50.0))
    assert found is not None
    assert "5 meV/Å on first and 50 on second" in found
    assert warn_of_unlike(errors(train=10.0, val=12.0)) is None
    assert warn_of_unlike(errors(train=nan, val=12.0)) is None
    assert warn_of_unlike({}) is None
    assert TeacherError(3, nan, inf).to_dict() == {
        "samples": 3,
        "energy_mae": None,
        "forces_mae": None,
    }


def test_info_prints_the_warning(memorised: FeatureStore) -> None:
    said = run_command(main, ["info", memorised.path]).stdout
    (line,) = (line for line in said.splitlines() if line.startswith("The teacher's"))
    assert line.endswith("frames that a teacher has memorised says little.")
    error = measure_teacher(memorised.splits["val"])
    assert error is not None
    assert f"on train and {error.forces_mae:.3g} on val" in line
