import subprocess
import sys
from pathlib import Path

import pytest
import toy_store


@pytest.mark.parametrize("mode", ["kill", "points"])
def test_killed_builds_end_in_the_same_bytes(tmp_path: Path, mode: str):
    command = [sys.executable, toy_store.__file__, mode, str(tmp_path), "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 12
