"""Import layers, lint, format and types hold for the whole repository."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("pipeline", "kd_train", "tests")


def _check(module: str, *command: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_imports_follow_the_layers() -> None:
    program = "import sys; from importlinter.cli import lint_imports; "
    _check("importlinter", "-c", program + "sys.exit(lint_imports())")


def test_lint_finds_nothing() -> None:
    _check("ruff", "-m", "ruff", "check", *CODE)


def test_format_is_uniform() -> None:
    _check("ruff", "-m", "ruff", "format", "--check", *CODE)


def test_types_agree() -> None:
    _check("mypy", "-m", "mypy")


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
