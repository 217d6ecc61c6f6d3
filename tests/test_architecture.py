"""What the commands import before they know what they are asked for."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("package", ["pipeline", "kd_train"])
def test_commands_start_without_heavy_imports(package: str) -> None:
    heavy = {"torch", "torch_geometric", "zarr", "dask", "distributed", "ase", "lmdb"}
    program = (
        f"import sys, {package}.cli; found = {heavy!r} & sys.modules.keys(); "
        "sys.exit(', '.join(sorted(found)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
