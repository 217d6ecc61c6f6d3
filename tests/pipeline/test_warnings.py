"""Warnings: one line each on standard error and in the log, from whatever process."""

import logging
from pathlib import Path
from typing import Any

import click
import pytest

from pipeline.cli.main import main
from pipeline.console import one_sentence_errors
from pipeline.logs import collect_warnings, log_again, log_to_file, report_warnings
from pipeline.parallel.ordered_map import processes
from tests.commands import run_command
from tests.frames import collision_frames, write_frames
from tests.pipeline.builds import RunningBuild
from tests.stores import spec_document, write_spec

TF32 = "teacher.precision: tf32 changes nothing on cpu"


def warned(text: str) -> list[str]:
    """Warnings on standard error, each the beginning of a line."""
    return [
        s.removeprefix("Warning: ")
        for s in text.split("\n")
        if s.startswith("Warning: ")
    ]


def logged(log: Path) -> list[str]:
    """Warnings in a log."""
    lines = log.read_text().splitlines()
    return [s.split(" WARNING ", 1)[1] for s in lines if " WARNING " in s]


def _spec(folder: Path, teacher: Path, **splits: list[str]) -> Path:
    files = {n: write_frames(folder / f"{n}.extxyz", f) for n, f in splits.items()}
    document: dict[str, Any] = spec_document(files, folder / "s.zarr", teacher)
    document["teacher"]["precision"] = "tf32"
    return write_spec(folder / "s.yaml", document)


@click.command()
@click.argument("log", type=click.Path(path_type=Path))
@one_sentence_errors
def early_and_late(log: Path) -> None:
    """Warn before the log has a place, and after; once more in the same words."""
    logging.getLogger("kd_train").warning("early %d", 1)
    logging.getLogger("pipeline.a").info("not kept: nobody asked for it yet")
    log_to_file(log)
    logging.getLogger("pipeline.b").warning("late")
    logging.getLogger("pipeline.c").warning("late")
    logging.getLogger("pipeline.c").info("kept")


def test_warnings_go_to_stderr_and_log_from_any_moment(tmp_path: Path) -> None:
    """And only to the log of the command at hand, where several run in a process."""
    logs = [tmp_path / "deep" / "a.log", tmp_path / "b.log"]
    for log in logs:
        said = run_command(early_and_late, [log])
        assert said.stderr == "Warning: early 1\nWarning: late\n"
    for log in logs:
        assert logged(log) == ["early 1", "late"]
        assert log.read_text().splitlines()[-1].endswith("INFO kept")


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = run_command(early_and_late, [tmp_path / "file" / "a.log"])
    assert said.exit_code == 0
    assert warned(said.stderr) == ["early 1", "late"]


def test_commands_that_warn_of_nothing_leave_no_log(
    tmp_path: Path, teacher_file: Path
) -> None:
    spec = _spec(tmp_path, teacher_file, train=collision_frames(4))
    words = ["check-teacher", spec, "--device", "cpu", "--samples", 1]
    run_command(main, [*words, "--set", "teacher.precision=float32"])
    assert not list(tmp_path.glob("*.log"))


def test_labelling_warns_in_its_folder(tmp_path: Path, teacher_file: Path) -> None:
    spec = _spec(tmp_path, teacher_file, train=collision_frames(4))
    said = run_command(
        main, ["label", spec, "--out", tmp_path / "out", "--device", "cpu"]
    )
    assert warned(said.stderr) == [TF32]
    assert logged(tmp_path / "out" / "label.log") == [TF32]


def test_adding_a_split_warns_of_it(tmp_path: Path, teacher_file: Path) -> None:
    frames = collision_frames(6)
    first = _spec(tmp_path, teacher_file, train=frames)
    assert run_command(main, ["build", first, "--device", "cpu"]).exit_code == 0
    log = tmp_path / "s.zarr.log"
    before = len(logged(log))
    more = _spec(tmp_path, teacher_file, train=frames, val=frames[:1])
    said = run_command(main, ["add-field", more, "--device", "cpu"])
    assert said.exit_code == 0, said.output
    told = warned(said.stderr)
    assert (
        sum("have structures that splits.train also has" in line for line in told) == 1
    )
    assert logged(log)[before:] == told


@pytest.mark.timeout(600)
def test_workers_hand_their_warnings_on_once(
    tmp_path: Path, teacher_file: Path
) -> None:
    """Each of two workers loads the teacher and has the same to tell as the first."""
    spec = _spec(tmp_path, teacher_file, train=collision_frames(6))
    exit_code, said = RunningBuild(
        "build", spec, "--device", "cpu", "--workers", 2
    ).end()
    assert exit_code == 0, said
    told = warned(said)
    assert told.count(TF32) == said.count(TF32) == 1
    assert logged(tmp_path / "s.zarr.log") == told


def _warning(number: int) -> int:
    logging.getLogger("pipeline.datasets").warning("of number %d", number // 2)
    return number


@pytest.mark.timeout(600)
def test_passes_hand_warnings_on(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of the processes that read datasets."""
    with report_warnings():
        log_to_file(tmp_path / "a.log")
        with processes(2) as run:
            assert list(run(_warning, range(4))) == [0, 1, 2, 3]
    expected = ["of number 0", "of number 1"]
    assert warned(capfd.readouterr().err) == expected
    assert logged(tmp_path / "a.log") == expected


def test_what_a_thread_warns_of_can_be_told_elsewhere(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("pipeline.parallel")
    with report_warnings():  # as in a process that has handlers
        with collect_warnings() as found:
            logger.warning("here")
        assert found == []
        log_again(found)
    assert [record.getMessage() for record in caplog.records] == ["here"]
