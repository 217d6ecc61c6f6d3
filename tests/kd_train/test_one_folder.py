"""Two processes, one folder: the second is refused, a dead one holds nothing. A10."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kd_train.cli.evaluate import eval_main
from kd_train.cli.train import cka_main, main, report_main
from pipeline.cli.main import main as cache_main
from pipeline.errors import BusyError
from pipeline.files.atomic import hold_lock
from pipeline.store.reader import FeatureStore
from tests.commands import refusal, run_command
from tests.stores import STUDENTS

STUDENT = "painn-small-demo"
# Holds a folder until standard input is closed.
HOLD = """
import sys
from pathlib import Path
from pipeline.files.atomic import hold_lock
with hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def _holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds ``folder``; ended when the block is left."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


def _training(store: FeatureStore, out: Path, *more: object) -> list[object]:
    sizes = STUDENTS[STUDENT].items()
    settings = ["batch_size=16", "eval_every=2"]
    settings += [f"student.hyperparameters.{key}={value}" for key, value in sizes]
    flags = [part for setting in settings for part in ("--set", setting)]
    return [
        *("--cache", store.path, "--out", out, "--student", STUDENT),
        *("--steps", 3, "--device", "cpu", *flags, *more),
    ]


def test_a_second_training_is_refused(
    labels_store: FeatureStore, tmp_path: Path
) -> None:
    """A10: both ended with exit code 0, and one result was lost."""
    out = tmp_path / "runs" / "run #1"
    sentence = (
        f"{out} is in use by another process; wait for it to end or choose another "
        "--out."
    )
    with _holder(out):
        for more in ((), ("--resume",), ("--auto-resume",)):
            assert refusal(main, _training(labels_store, out, *more)) == sentence
        assert {path.name for path in out.iterdir()} == {".lock"}
    assert not out.exists()
    assert run_command(main, _training(labels_store, out)).exit_code == 0
    assert not (out / ".lock").exists()
    with _holder(out):
        assert refusal(main, _training(labels_store, out, "--resume")) == sentence
    assert (out / "metrics.json").exists()


def test_a_killed_training_holds_nothing(
    labels_store: FeatureStore, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with _holder(out) as process:
        process.kill()
        process.wait()
        assert (out / ".lock").exists()
        assert run_command(main, _training(labels_store, out)).exit_code == 0
    assert not (out / ".lock").exists()


def _report(finished: Path, spec: Path, store: Path, out: Path) -> list[object]:
    return [report_main, finished, "--out", out]


def _eval(finished: Path, spec: Path, store: Path, out: Path) -> list[object]:
    return [eval_main, finished, "--data", store, "--split", "val", "--out", out]


def _cka(finished: Path, spec: Path, store: Path, out: Path) -> list[object]:
    chosen = ["--data", store, "--split", "val", "--limit", 4, "--out", out]
    return [cka_main, finished, finished, *chosen]


def _label(finished: Path, spec: Path, store: Path, out: Path) -> list[object]:
    few = ["--set", "splits.train.limit=2", "--set", "splits.val=null"]
    return [cache_main, "label", spec, "--out", out, "--device", "cpu", *few]


@pytest.mark.parametrize("command", [_report, _eval, _cka, _label])
def test_other_commands_write_alone_too(
    command: Callable[..., list[Any]],
    finished: Path,
    small_spec: Path,
    small_store: FeatureStore,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out #2"
    program, *arguments = command(finished, small_spec, small_store.path, out)
    with _holder(out):
        assert "out #2 is in use by another process" in refusal(program, arguments)
        # Warnings go to the log of the folder that was named.
        assert {path.name for path in out.iterdir()} <= {".lock", "eval.log"}
    assert run_command(program, arguments).exit_code == 0
    assert not (out / ".lock").exists()


def test_a_folder_is_left_as_it_was_found(tmp_path: Path) -> None:
    with hold_lock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    with (
        hold_lock(tmp_path / "mine"),
        pytest.raises(BusyError),
        hold_lock(tmp_path / "mine"),
    ):
        raise AssertionError
    assert list((tmp_path / "mine").iterdir()) == []


def test_warnings_before_the_folder_is_made_are_in_the_log(
    labels_store: FeatureStore, tmp_path: Path
) -> None:
    """They were on standard error alone, without the word Warning."""
    out = tmp_path / "run"
    done = run_command(main, _training(labels_store, out, "--set", "val_split=train"))
    lines = [s for s in done.stderr.splitlines() if s.startswith("Warning: ")]
    assert any(s.startswith("Warning: val_split: 160 of the 160") for s in lines)
    log = (out / "train.log").read_text()
    assert all(f"WARNING {s.removeprefix('Warning: ')}" in log for s in lines)
