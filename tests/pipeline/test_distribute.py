"""Running tasks: never too many at once, tried again or given up, one end for each."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import BusyError, DataError, WorkersError
from pipeline.parallel.local_cluster import local_workers
from pipeline.parallel.task_pool import (
    DaskPool,
    TaskLost,
    TaskResult,
    ThreadPool,
    connect,
    run_tasks,
)
from tests.pipeline.builds import ROOT

THREADS = 3


@pytest.fixture
def threads() -> Iterator[ThreadPool]:
    pool = ThreadPool(THREADS)
    yield pool
    pool.close()


class Tasks:
    """Squares, after as many errors as are written down for an item.

    Its first ``meeting`` items end when so many run at once.
    """

    def __init__(self, errors: dict[int, list[Exception]], meeting: int = 0) -> None:
        self.errors = errors
        self.meeting = meeting
        self._all_there = threading.Barrier(meeting, timeout=600) if meeting else None
        self.calls: Counter[int] = Counter()
        self.most = 0
        self._at_once = 0
        self._lock = threading.Lock()

    def __call__(self, item: int) -> int:
        with self._lock:
            self.calls[item] += 1
            self._at_once += 1
            self.most = max(self.most, self._at_once)
        if self._all_there and item < self.meeting:
            self._all_there.wait()
        time.sleep(0.002)
        with self._lock:
            self._at_once -= 1
        if self.errors.get(item):
            raise self.errors[item].pop(0)
        return item * item


def test_every_task_has_one_end_and_few_run_at_once(threads: ThreadPool) -> None:
    tasks = Tasks({}, meeting=THREADS)
    ends = list(run_tasks(threads, tasks, range(40)))
    assert sorted((end.item, end.result) for end in ends) == [
        (n, n * n) for n in range(40)
    ]
    assert all(end.error is None and end.attempts == 1 for end in ends)
    assert tasks.most == THREADS
    assert list(run_tasks(threads, tasks, [])) == []


def test_failing_systems_are_tried_again_and_data_are_not(threads: ThreadPool) -> None:
    lost, network = TaskLost("gone"), OSError(errno.EIO, "unplugged")
    tasks = Tasks(
        {
            1: [network],
            2: [lost, network],
            3: [network] * 3,
            4: [DataError("Sample 'x' is bad.")],
        }
    )
    told: list[int] = []
    ends = {
        end.item: end
        for end in run_tasks(
            threads,
            tasks,
            range(6),
            retries=2,
            delay=0.001,
            on_retry=lambda item, error: told.append(item),
        )
    }
    assert {n: end.attempts for n, end in ends.items()} == tasks.calls
    assert tasks.calls == {0: 1, 1: 2, 2: 3, 3: 3, 4: 1, 5: 1}
    assert sorted(told) == [1, 2, 2, 3, 3]
    assert ends[2].result == 4
    assert ends[3].error is network
    assert isinstance(ends[4].error, DataError)


def test_full_disks_and_mistakes_of_the_program_end_everything(
    threads: ThreadPool,
) -> None:
    for error in (TypeError("a mistake"), OSError(errno.ENOSPC, "full")):
        tasks = Tasks({3: [error]})
        with pytest.raises(type(error)):
            for _ in run_tasks(threads, tasks, range(1000)):
                pass
        assert sum(tasks.calls.values()) < 100


def _square(folder: Path, item: int) -> int:
    """Dies once at every tenth item, and tells of every call by a file."""
    number = len(list(folder.glob(f"{item}.*")))
    (folder / f"{item}.{number}").touch()
    if item % 10 == 4 and number == 0:
        os._exit(9)
    return item * item


def test_tasks_of_dead_workers_are_done_by_others(tmp_path: Path) -> None:
    retried: list[int] = []
    with local_workers(2) as client:
        pool = DaskPool(client)
        ends = list(
            run_tasks(
                pool,
                partial(_square, tmp_path),
                range(20),
                on_retry=lambda item, error: retried.append(item),
            )
        )
        assert sorted((e.item, e.result) for e in ends) == [
            (n, n * n) for n in range(20)
        ]
        assert {4, 14} <= set(retried)
        # Nothing is left over, and a second round works with the same processes.
        assert [e.result for e in run_tasks(pool, abs, [-7])] == [7]
        address = client.scheduler.address
    words = f"No Dask scheduler answers at {address}"
    with pytest.raises(WorkersError, match=words), connect(address, 0.5):
        pass


def _kill_beside(folder: Path, item: int) -> int:
    """Item 0 ends its process as soon as it runs; the others only take a moment."""
    if item == 0:
        os._exit(9)
    (folder / f"{item}.{len(list(folder.glob(f'{item}.*')))}").touch()
    return item


def test_only_the_task_that_kills_its_workers_is_given_up(tmp_path: Path) -> None:
    """What waits at the same worker is lost with it each time, and did nothing."""
    with local_workers(1, 1) as client:
        pool = DaskPool(client)
        task = partial(_kill_beside, tmp_path)
        ends = list(run_tasks(pool, task, range(3), retries=0, delay=0.01))
    assert [type(end.error) for end in sorted(ends, key=lambda e: e.item)] == [
        TaskLost,
        type(None),
        type(None),
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["1.0", "2.0"]


def test_items_in_other_hands_are_waited_for(threads: ThreadPool) -> None:
    """Which is no try of theirs, and has an end."""
    busy = BusyError("Block 1 is being written by another process")

    def end_of_one(times: int, longest_wait: float) -> tuple[TaskResult[int, int], int]:
        tasks = Tasks({1: [busy] * times})
        ends = run_tasks(
            threads,
            tasks,
            range(4),
            retries=0,
            awaited=lambda error: isinstance(error, BusyError),
            delay=0.001,
            longest_wait=longest_wait,
        )
        (one,) = (end for end in list(ends) if end.item == 1)
        return one, tasks.calls[1]

    one, calls = end_of_one(4, 3600)
    assert (one.result, one.attempts, calls) == (1, 1, 5)
    one, calls = end_of_one(1000, 0.3)
    assert one.error is busy
    # Pauses grow; how many fit in depends on the machine.
    assert 2 <= calls < 20


def test_waiting_for_workers_ends(tmp_path: Path) -> None:
    with local_workers(0) as client:
        pool = DaskPool(client, patience=0.2)
        with pytest.raises(WorkersError, match="No Dask worker"):
            list(run_tasks(pool, abs, [1]))


@pytest.mark.slow
def test_a_simulated_build_loses_nothing_and_does_nothing_twice(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "scheduling.py"
    options = ["--blocks", 60, "--workers", 12, "--seconds", 0.02, "--only", "both"]
    more = ["--failing", 0.1, "--dying", 0.1, "--folder", tmp_path, "--json"]
    done = subprocess.run(
        [sys.executable, script, *map(str, options), *map(str, more)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["lost"], row["twice"], row["given_up"]) == (0, 0, 0)
    assert row["failures"] > 2
    assert row["deaths"] > 2
    assert row["tries"] >= 60 + row["failures"]
