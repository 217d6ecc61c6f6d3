"""Builds with worker processes and clusters: killed anywhere, continued to equal bytes.

A block that the test itself holds keeps a build from ending before it is killed.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.build.build import build_store
from pipeline.build.fill import check_workers
from pipeline.build.worker import FillOptions
from pipeline.cli.main import main
from pipeline.errors import WorkersError
from pipeline.parallel.task_pool import connect
from pipeline.spec.cache_spec import load_spec
from pipeline.store.reader import FeatureStore
from pipeline.store.writer import StoreWriter
from tests.commands import run_command
from tests.frames import frame, write_frames
from tests.pipeline.builds import ROOT, RunningBuild, gone, shards, wait_until
from tests.stores import build, spec_document, write_spec

BLOCKS = 12
HELD = 5


@pytest.fixture(scope="module")
def chains(
    tmp_path_factory: pytest.TempPathFactory, teacher_file: Path
) -> tuple[Path, dict[str, str]]:
    """Spec with blocks of two large samples each, and its files built in one go."""
    folder = tmp_path_factory.mktemp("chains")
    frames = [
        frame(
            f"chain{n}", ["C"] * 400, [[0.1 * (i % 3), 0, 2.5 * i] for i in range(400)]
        )
        for n in range(2 * BLOCKS)
    ]
    data = write_frames(folder / "d.extxyz", frames)
    features = {"node_features": None}
    document = spec_document({"train": data}, folder / "s.zarr", teacher_file, features)
    spec = write_spec(folder / "s.yaml", document)
    return spec, shards(build(spec).path)


@contextmanager
def _held(spec: Path, store: Path) -> Iterator[None]:
    """A planned store whose block HELD nobody else can write."""
    planned = load_spec(spec, [f"store.path={store}"])
    assert not build_store(planned, filling=FillOptions(blocks=(99, 100)))
    with StoreWriter(store).claim_block("train", HELD) as missing:
        assert missing
        yield


def _status(store: Path) -> dict[str, object]:
    return dict(json.loads(store.with_name(store.name + ".status.json").read_text()))


def _log(store: Path) -> str:
    file = store.with_name(store.name + ".log")
    return file.read_text() if file.exists() else ""


def _writings(store: Path, block: int) -> int:
    """How often builds have told that they wrote ``block``; not of its retries."""
    return len(re.findall(rf"block {block} of .* written", _log(store)))


@pytest.mark.slow
def test_kills_of_workers_and_jobs_leave_a_store_to_go_on_with(
    chains: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    spec, reference = chains
    store = tmp_path / "s.zarr"
    build_it = ("build", spec, "--out", store, "--device", "cpu", "--threads", 1)
    with _held(spec, store):
        job = RunningBuild(*build_it, "--workers", 2, "--retries", 20)
        try:
            wait_until(lambda: " written, 1 of" in _log(store), "the first block")
            job.workers()[0].kill()
            # Later the worker may have had no task, where this test was slow.
            had_tasks = len(re.findall(" written, ", _log(store))) < BLOCKS - 5
            wait_until(lambda: f"{BLOCKS - 1} of {BLOCKS}" in _log(store), "the others")
            wait_until(lambda: _status(store)["blocks_done"] == BLOCKS - 1, "status")
            told = _status(store)
            assert told["state"] == "filling"
            assert told["samples_done"] == 2 * (BLOCKS - 1)
            assert told["samples_total"] == 2 * BLOCKS
            assert told["pid"] == job.process.pid
            assert int(str(told["retries"])) > 0
            assert "died with the task" in _log(store) or not had_tasks
            workers = job.workers()
            code, said = job.interrupt()
        finally:
            job.process.kill()
        assert code == 130, said
        assert "Stopped by SIGINT" in said
        assert "Traceback" not in said
        assert "Error" not in said
        wait_until(lambda: gone(workers), "the workers' end")
        assert _status(store)["state"] == "interrupted"

        StoreWriter(store).discard_block("train", 0)
        before = _writings(store, 0)
        job = RunningBuild(*build_it, "--workers", 1, "--retries", 20)
        try:
            wait_until(lambda: _writings(store, 0) > before, "block 0")
            workers = job.workers()
            assert workers
        finally:
            os.kill(job.process.pid, signal.SIGKILL)
            job.end()
        wait_until(lambda: gone(workers), "the workers' end")
        assert _status(store)["state"] == "filling"
    done = run_command(main, build_it)
    assert "complete and sealed" in done.stdout
    assert shards(store) == reference
    assert _status(store)["state"] == "done"


_SLOW_DISK = """
import pathlib, time
from pipeline.store.writer import StoreWriter
write, begun = StoreWriter.write_block, []
def slow(writer, *arguments):
    if begun:
        pathlib.Path(writer.path).with_name("slow").touch()
        time.sleep(3600)
    begun.append(arguments)
    return write(writer, *arguments)
StoreWriter.write_block = slow
"""


def test_a_build_without_workers_stops_at_once_too(
    chains: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """It does not wait for the block that it is at, which takes an hour here."""
    spec, reference = chains
    store = tmp_path / "s.zarr"
    build_it = ("build", spec, "--out", store, "--device", "cpu")
    job = RunningBuild(*build_it, first=_SLOW_DISK)
    wait_until((tmp_path / "slow").exists, "the second block")
    job.process.terminate()
    code, said = job.end()
    assert code == 143, said
    assert "Stopped by SIGTERM" in said
    assert "Traceback" not in said
    assert _status(store)["state"] == "interrupted"
    assert not FeatureStore.open(store, allow_unsealed=True).attributes["complete"]
    assert "complete and sealed" in run_command(main, build_it).stdout
    assert shards(store).keys() == reference.keys()


class Cluster:
    """A Dask scheduler and one worker, each a process that this test started."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "scheduler.json"
        self.scheduler = self._start("dask_scheduler", "--port", 0)
        wait_until(self._file.exists, "the scheduler")
        self.worker = self._start(
            "dask_worker", "--nthreads", 2, "--death-timeout", 1800
        )
        self.address = str(json.loads(self._file.read_text())["address"])

    def _start(self, program: str, *options: object) -> subprocess.Popen[bytes]:
        common = ("--scheduler-file", self._file, "--no-dashboard")
        command = [sys.executable, "-m", f"distributed.cli.{program}"]
        return subprocess.Popen(
            [*command, *map(str, (*common, *options))],
            cwd=self._file.parent,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def end(self) -> None:
        for process in (self.worker, self.scheduler):
            process.terminate()
            process.wait(1800)


@pytest.mark.slow
def test_a_cluster_writes_the_same_bytes_and_may_be_lost(
    chains: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    spec, reference = chains
    store = tmp_path / "s.zarr"
    build_it = ["build", spec, "--out", store, "--device", "cpu", "--threads", 1]
    cluster = Cluster(tmp_path)
    build_there = [*build_it, "--scheduler", cluster.address, "--retries", 20]
    try:
        with connect(cluster.address, 1800) as client:
            client.wait_for_workers(1, timeout=1800)
            with pytest.raises(WorkersError, match=r"does not see the store .*absent"):
                check_workers(client, tmp_path / "absent", "a fingerprint")
        done = run_command(main, build_there)
        assert "complete and sealed" in done.stdout
        assert shards(store) == reference

        writer = StoreWriter(store)
        for block in (HELD, 1, 2):
            writer.discard_block("train", block)
        with writer.claim_block("train", HELD):
            before = _writings(store, 2)
            job = RunningBuild(*build_there)
            wait_until(lambda: _writings(store, 2) > before, "another block")
            cluster.scheduler.kill()
            code, said = job.end()
        assert code == 2
        assert f"The Dask scheduler at {cluster.address} is gone" in said
        assert "Traceback" not in said
        assert _status(store)["state"] == "failed"
    finally:
        cluster.end()
    assert "complete and sealed" in run_command(main, build_it).stdout
    assert shards(store) == reference


def test_workers_and_scheduler_exclude_each_other(
    chains: tuple[Path, dict[str, str]],
) -> None:
    more = ["--workers", 2, "--scheduler", "tcp://127.0.0.1:1"]
    done = run_command(main, ["build", chains[0], *more])
    assert done.exit_code == 2
    assert "exclude each other" in done.stderr
