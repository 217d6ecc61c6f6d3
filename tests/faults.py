"""Runs ``benchmarks/faults.py`` in small numbers, in a process that may fork."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# A kill does not ask where files lie, and syncing a disk takes most of the time.
_MEMORY = Path("/dev/shm")


def run_faults(*arguments: object) -> dict[str, dict[str, Any]]:
    """What was counted, by name; fails with all that went wrong."""
    script = ROOT / "benchmarks" / "faults.py"
    where = ["--folder", str(_MEMORY)] if _MEMORY.is_dir() else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments), *where, "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout))
