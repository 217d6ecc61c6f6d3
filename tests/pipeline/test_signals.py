"""Ctrl-C and SIGTERM end every long command alike, wherever they meet it."""

import itertools
import os
import shutil
import signal
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.cli import progress as console
from pipeline.cli.main import main
from pipeline.parallel.signals import Stopped, stop_on_signals
from pipeline.store.backends import LocalBackend
from pipeline.store.reader import FeatureStore
from pipeline.store.transfer import FolderTarget, copy_store
from tests.commands import run_command
from tests.pipeline.builds import RunningBuild, gone, wait_until
from tests.stores import spec_document, write_spec


def _held(pipe: Path) -> int:
    """Write end of ``pipe``, once somebody reads it, who waits from then on."""
    ends: list[int] = []

    def is_read() -> bool:
        with suppress(OSError):
            ends.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return bool(ends)

    wait_until(is_read, f"somebody to read {pipe}")
    return ends[0]


@pytest.mark.parametrize(
    ("command", "number", "words"),
    [
        ("build", signal.SIGTERM, "goes on where it stopped."),
        ("plan", signal.SIGINT, "planned whole or not at all"),
        ("add-field", signal.SIGINT, "goes on where it stopped."),
        ("seal", signal.SIGTERM, "the store is not sealed"),
        ("verify", signal.SIGINT, "the check is not finished"),
        ("compact", signal.SIGTERM, "goes on where it stopped."),
        ("hydrate", signal.SIGINT, "goes on where it stopped."),
        ("push", signal.SIGINT, "goes on where it stopped."),
    ],
)
def test_every_long_command_ends_with_one_sentence(
    command: str,
    number: signal.Signals,
    words: str,
    datasets: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends: list[tuple[str, int]] = []

    def end(text: str, exit_code: int) -> None:
        ends.append((text, exit_code))
        raise SystemExit(exit_code)

    def strike(self: LocalBackend, name: str) -> None:
        os.kill(os.getpid(), number)

    # The end of the process would be that of all tests.
    monkeypatch.setattr(console, "_end_process", end)
    store = tmp_path / "s.zarr"
    store.mkdir()
    document = spec_document({"train": datasets["train"]}, store)
    spec = write_spec(tmp_path / "s.yaml", document)
    arguments: list[object] = [store]
    if command in ("build", "plan", "add-field"):
        arguments = [spec, "--device", "cpu"]
    elif command in ("compact", "hydrate", "push"):
        arguments = [store, tmp_path / "t.zarr"]
    monkeypatch.setattr(LocalBackend, "size", strike)
    done = run_command(main, [command, *arguments])
    assert done.exit_code == 128 + number
    ((text, _),) = ends
    assert text.startswith(f"Stopped by {number.name}; ")
    assert words in text
    status = {f.name for f in tmp_path.iterdir() if "status" in f.name}
    told = command in ("build", "add-field")
    assert status == ({"s.zarr.status.json"} if told else set())


def test_ctrl_c_ends_the_processes_of_a_pass(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    store = tmp_path / "s.zarr"
    shutil.copytree(small_store.path, store)
    shard = store / "train/structures/tags/c/1"
    shard.unlink()
    os.mkfifo(shard)
    job = RunningBuild("verify", store, "--workers", 1)
    try:
        held = _held(shard)
        workers = job.workers()
        assert workers
        code, said = job.interrupt()
        os.close(held)
    finally:
        job.process.kill()
    assert code == 130, said
    assert said.count("\n") == 1, said
    assert said.startswith("Stopped by SIGINT; the check is not finished")
    wait_until(lambda: gone(workers), "the workers' end")
    assert not list(tmp_path.glob("*status*"))


def test_a_stopped_copy_does_not_copy_the_rest_first(
    small_store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads are left at what they do; nobody waits for them."""
    going_on, number = threading.Event(), itertools.count()
    write = FolderTarget.write

    def slow(self: FolderTarget, name: str, content: bytes) -> None:
        if "/tags/c/" in name:
            if next(number) == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            assert going_on.wait(1800)
        write(self, name, content)

    monkeypatch.setattr(FolderTarget, "write", slow)
    with pytest.raises(Stopped), stop_on_signals():
        copy_store(small_store.path, tmp_path / "t.zarr")
    assert not going_on.is_set()
    assert not list(tmp_path.rglob("index/commit/c/*/*/*"))
    going_on.set()
