"""docs/tutorial.md is run word for word, and its outputs are those that come."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Step:
    """One block of the page, what the page says it prints, and what it printed."""

    language: str
    code: str
    promised: str
    printed: str


def page_blocks() -> list[tuple[str, str, str]]:
    """Language, code and shown output of every block that is run."""
    found = _BLOCK.findall(PAGE.read_text())
    blocks = []
    for (language, code), (follower, shown) in zip(
        found, [*found[1:], ("", "")], strict=True
    ):
        if language != "text":
            blocks.append((language, code, shown if follower == "text" else ""))
    return blocks


def scripts_folder(folder: Path) -> Path:
    """Where the console scripts are; those not installed are made in ``folder``."""
    installed = Path(sys.executable).parent
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, target in project["scripts"].items():
        script = folder / name
        if (installed / name).exists():
            script.symlink_to(installed / name)
            continue
        module, function = target.split(":")
        script.write_text(
            f"#!{sys.executable}\nfrom {module} import {function}\n{function}()\n"
        )
        script.chmod(0o755)
    return folder


def run_shell(code: str, folder: Path, scripts: Path) -> str:
    environment = os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        ["bash", "-c", f"set -e\n{code}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{code}\n{done.stderr}"
    return done.stdout


def run_python(code: str, folder: Path, names: dict[str, Any]) -> str:
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(said):
        exec(compile(code, str(PAGE), "exec"), names)
    return said.getvalue()


@pytest.fixture(scope="module")
def tutorial(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[Step], dict[str, Any]]:
    """The folder after the whole page, its blocks, and the names that Python has."""
    folder = tmp_path_factory.mktemp("tutorial")
    shutil.copytree(ROOT / "cache_specs", folder / "cache_specs")
    scripts = scripts_folder(tmp_path_factory.mktemp("scripts"))
    names: dict[str, Any] = {}
    steps = []
    for language, code, promised in page_blocks():
        if language == "sh":
            printed = run_shell(code, folder, scripts)
        else:
            assert language == "python"
            printed = run_python(code, folder, names)
        printed = printed.replace(str(folder), "/…")
        steps.append(Step(language, code, promised, printed))
    return folder, steps, names


def test_shown_outputs_are_what_is_printed(
    tutorial: tuple[Path, list[Step], dict[str, Any]],
) -> None:
    """Up to numbers, which other processors round differently, and spacing."""
    _, steps, _ = tutorial
    assert len(steps) >= 5
    for step in steps:
        assert step.promised, f"no output is shown after\n{step.code}"
        assert _words(step.promised) == _words(step.printed), step.code


def _words(text: str) -> list[list[str]]:
    lines = _NUMBER.sub("#", text).splitlines()
    return [line.split() for line in lines if line.strip()]


def test_the_student_has_learned(
    tutorial: tuple[Path, list[Step], dict[str, Any]],
) -> None:
    folder, _, _ = tutorial
    card = json.loads((folder / "results/tutorial/metrics.json").read_text())
    run = json.loads((folder / "runs/tutorial/metrics.json").read_text())
    assert list(card["splits"]) == ["test"]
    test = card["splits"]["test"]
    assert test["samples"] == 100
    assert test["metrics"] == pytest.approx(run["metrics"], rel=1e-3)
    assert test["teacher_metrics"]["forces_mae"] < test["metrics"]["forces_mae"] < 500
    assert test["metrics"]["forces_cos"] > 0.75
    assert card["warnings"] == []
    with np.load(folder / "results/tutorial/predictions.npz") as file:
        assert len(set(file["sample_ids"])) == 100
        assert np.isfinite(file["forces"]).all()
        # Atoms at rest would be this wrong.
        assert np.abs(file["forces_label"]).mean() > 0.5


def test_the_relaxed_molecule_is_ethanol(
    tutorial: tuple[Path, list[Step], dict[str, Any]],
) -> None:
    _, _, names = tutorial
    atoms = names["atoms"]
    assert names["after"] < names["before"] - 0.2
    # Gas phase: C-C 1.51 Å, C-O 1.43 Å, O-H 0.97 Å, C-H 1.09 Å.
    for first, second, length in ((0, 1, 1.51), (1, 2, 1.43), (2, 3, 0.97)):
        assert atoms.get_distance(first, second) == pytest.approx(length, abs=0.15)
    for carbon, hydrogen in ((1, 4), (1, 5), (0, 6), (0, 7), (0, 8)):
        assert atoms.get_distance(carbon, hydrogen) == pytest.approx(1.09, abs=0.1)
