"""The status file and signals: what others can rely on while a build runs."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.build import status as module
from pipeline.build.build import build_store, plan_store
from pipeline.build.part import BuildPart
from pipeline.build.status import BuildStatus, status_file
from pipeline.build.worker import FillOptions
from pipeline.cli import progress as console
from pipeline.cli.main import main
from pipeline.parallel import ordered_map as passes
from pipeline.parallel.ordered_map import OrderedMap
from pipeline.parallel.signals import Stopped, stop_on_signals
from pipeline.spec.cache_spec import load_spec
from pipeline.store.writer import StoreWriter
from tests.commands import run_command
from tests.frames import collision_frames, write_frames
from tests.pipeline.builds import ROOT, wait_until
from tests.stores import spec_document, write_spec


def _read(path: Path) -> dict[str, object]:
    return dict(json.loads(path.read_text()))


def test_long_checks_show_how_far_they_are(
    small_spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "s.zarr"
    spec = load_spec(small_spec, [f"store.path={store}"])
    plan_store(spec)
    assert not build_store(spec, filling=FillOptions(part=BuildPart(1, 1)))
    blocks = sum(split.n_blocks for split in StoreWriter(store).splits.values())
    monkeypatch.setattr(console, "_MOMENT_S", 0.0)
    monkeypatch.setattr(console, "_interval_s", lambda: 0.0)
    for command in ("seal", "verify"):
        done = run_command(main, [command, store])
        assert done.exit_code == 0
        drawn = re.findall(r"(\d+)/(\d+) \[", done.stderr)
        assert {total for _, total in drawn} == {str(blocks)}
        assert [int(n) for n, _ in drawn][: blocks + 1] == [*range(blocks + 1)]
    monkeypatch.setattr(console, "_MOMENT_S", 600.0)
    assert run_command(main, ["verify", store]).stderr == ""


def _totals(said: str, what: str) -> list[tuple[int, int]]:
    """Counts and totals that a bar has drawn."""
    drawn = re.findall(rf"{what}: +\d+%\|[^|]*\| *(\d+)/(\d+) \[", said)
    return [(int(done), int(total)) for done, total in drawn]


def test_builds_and_conversions_show_how_far_sealing_is(
    small_spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_interval_s", lambda: 0.0)
    store = tmp_path / "s.zarr"
    build = ("build", small_spec, "--out", store, "--device", "cpu")
    compact = ("compact", store, tmp_path / "c.zarr")
    for command in (build, compact):
        done = run_command(main, command)
        assert done.exit_code == 0
        blocks = sum(split.n_blocks for split in StoreWriter(store).splits.values())
        drawn = list(dict.fromkeys(_totals(done.stderr, "seal")))
        assert drawn == [(n, blocks) for n in range(blocks + 1)]
    told = _read(store.with_name("s.zarr.status.json"))
    assert (told["blocks_checked"], told["blocks_total"]) == (blocks, blocks)
    assert _totals(run_command(main, build).stderr, "seal") == []


def test_planning_shows_how_many_samples_each_pass_has_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_interval_s", lambda: 0.0)
    monkeypatch.setattr(console, "_MOMENT_S", 0.0)
    monkeypatch.setattr("pipeline.build.scan.FOLD", 15)
    monkeypatch.setattr("pipeline.build.filter_samples._PIECE", 15)
    data = write_frames(tmp_path / "d.extxyz", collision_frames(40))
    split = {"format": "extxyz", "path": str(data), "on_bad_sample": "skip"}
    document = spec_document({"train": split}, tmp_path / "s.zarr")
    spec = write_spec(tmp_path / "s.yaml", document)
    progress = BuildStatus()
    told: list[tuple[int, int]] = []

    def count(done: int, total: int) -> None:
        if progress.state == "planning":
            told.append((done, total))
            assert told[-1] == (progress.samples_done, progress.samples)

    assert build_store(load_spec(spec), count=count, progress=progress)
    # Both passes, over all samples each: for bad ones, and for the content.
    assert told == [(n, 40) for n in (0, 15, 30, 40)] * 2
    assert progress.samples_done == 40
    for command in ("plan", "build"):
        out = ("--out", tmp_path / f"{command}.zarr", "--device", "cpu")
        said = run_command(main, [command, spec, *out]).stderr
        drawn = [pair for pair in _totals(said, "plan") if pair[0] in (15, 30)]
        assert drawn == [(15, 40), (30, 40)] * 2


@pytest.mark.parametrize("more", [0, 1])
def test_workers_seal_where_there_are_many_blocks(
    more: int,
    datasets: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def counting(workers: int) -> AbstractContextManager[OrderedMap]:
        asked.append(workers)
        return passes.processes(0)

    store = tmp_path / "s.zarr"
    spec = load_spec(write_spec(tmp_path / "s.yaml", spec_document(datasets, store)))
    plan_store(spec)
    assert not build_store(spec, filling=FillOptions(part=BuildPart(1, 1)))
    blocks = sum(split.n_blocks for split in StoreWriter(store).splits.values())
    monkeypatch.setattr(passes, "_FEW", blocks + more)
    monkeypatch.setattr("pipeline.build.build.processes", lambda _: passes.processes(0))
    monkeypatch.setattr("pipeline.store.writer.processes", counting)
    assert build_store(spec, filling=FillOptions(workers=2))
    assert asked == [0 if more else 2]


def test_status_follows_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "INTERVAL_S", 0.01)
    clock = iter([5.0, 7.0, 7.5])
    path = tmp_path / "deep" / "s.status.json"
    progress = BuildStatus()
    with status_file(path, progress):
        first = _read(path)
        assert first["state"] == "planning"
        assert first["pid"] == os.getpid()
        assert first["samples_per_second"] is None
        with monkeypatch.context() as patch:
            patch.setattr(
                module, "time", SimpleNamespace(monotonic=lambda: next(clock))
            )
            progress.begin(blocks=4, samples=40, done=1, samples_done=10)
            progress.add(10)
            progress.add(10)
        wait_until(lambda: _read(path)["blocks_done"] == 3, "the third block")
        told = _read(path)
        # Ten samples in the time between two blocks, and ten are left.
        assert progress.rate == 20
        assert (told["samples_per_second"], told["eta_seconds"]) == (20, 0.5)
        assert (told["samples_done"], told["samples_total"]) == (30, 40)
        assert told["started"] == first["started"]
    assert _read(path)["state"] == "done"
    assert [f.name for f in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("error", "state", "words"),
    [
        (Stopped(signal.SIGTERM), "interrupted", None),
        (KeyboardInterrupt(), "interrupted", None),
        (ValueError("wrong"), "failed", "wrong"),
    ],
)
def test_status_tells_how_it_ended(
    error: BaseException, state: str, words: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "s.status.json"
    with pytest.raises(type(error)), status_file(path, BuildStatus()):
        raise error
    assert (_read(path)["state"], _read(path)["error"]) == (state, words)


def test_readers_never_see_half_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "INTERVAL_S", 0.0)
    path = tmp_path / "s.status.json"
    progress = BuildStatus(failed={f"block {n}": "reason" * 20 for n in range(300)})
    with status_file(path, progress):
        assert all(len(_read(path)["failed_blocks"]) == 300 for _ in range(200))  # type: ignore[arg-type]


def test_a_second_process_leaves_the_file_to_the_first(tmp_path: Path) -> None:
    path = tmp_path / "s.status.json"
    program = (
        "import sys; from pathlib import Path; "
        "from pipeline.build.status import BuildStatus, status_file\n"
        "with status_file(Path(sys.argv[1]), BuildStatus()): raise SystemExit(7)"
    )
    command = [sys.executable, "-c", program, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with status_file(path, BuildStatus()):
        other = subprocess.run(command, env=environment, capture_output=True)
        assert other.returncode == 7, other.stderr
        assert _read(path)["pid"] == os.getpid()
    assert _read(path)["state"] == "done"
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 7
    assert _read(path)["state"] == "failed"


def test_the_first_signal_stops_and_later_ones_do_not_disturb() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped, stop_on_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(10)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.exit_code == 143
    assert str(stopped.value) == "SIGTERM"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_signals_that_are_ignored_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
