"""Builds as other processes run them: started, looked at, killed."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
# Nothing takes as long, on no machine; it ends what hangs.
_ANSWER_S = 1800.0


def shards(store: Path) -> dict[str, str]:
    """Digest of every file of a store but the root's record of paths, by its place."""
    return {
        str(file.relative_to(store)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(store.rglob("*"))
        if file.is_file()
        and str(file.relative_to(store)) not in ("zarr.json", "digests/c/0")
    }


def wait_until(told: Callable[[], object], what: str) -> None:
    """Return once ``told()`` is true; fails when that never comes."""
    deadline = time.monotonic() + _ANSWER_S
    while not told():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


class RunningBuild:
    """``kd-cache`` in a process group of its own, as a terminal starts it.

    ``first`` is code that the process runs before the command.
    """

    def __init__(self, *arguments: object, first: str = "") -> None:
        program = f"{first}\nfrom pipeline.cli.main import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def workers(self) -> list[psutil.Process]:
        """Worker processes that are alive."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [c for c in children if _is_worker(c)]

    def interrupt(self) -> tuple[int, str]:
        """Ctrl-C, which goes to the whole group; exit code and standard error."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.end()

    def end(self) -> tuple[int, str]:
        """Exit code and standard error, once it ends."""
        _, said = self.process.communicate(timeout=_ANSWER_S)
        return self.process.returncode, said


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it has ended since it was listed
        return False


def gone(processes: list[psutil.Process]) -> bool:
    """Whether all these processes have ended."""
    return not any(
        p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes
    )
