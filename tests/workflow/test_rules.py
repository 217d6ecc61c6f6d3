"""The Snakemake rules: each can be planned, and the linter has no new complaint."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("snakemake")
ROOT = Path(__file__).parents[2]
SPECS = sorted(path.stem for path in (ROOT / "cache_specs").glob("*.yaml"))

pytestmark = pytest.mark.workflow


def _snakemake(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("target", [*(f"cache_{spec}" for spec in SPECS), "demo"])
def test_every_rule_can_be_planned(target: str) -> None:
    done = _snakemake("--dry-run", "--forceall", "--cores", "2", target)
    assert done.returncode == 0, done.stderr
    assert target in done.stdout + done.stderr


def test_overrides_reach_the_command() -> None:
    done = _snakemake(
        *("--dry-run", "--forceall", "--printshellcmds", "--cores", "2", "cache_demo"),
        *("--config", "set=splits.train.limit=7 store.seed=3"),
    )
    commands = done.stdout + done.stderr
    assert "--set splits.train.limit=7 --set store.seed=3" in commands


def test_the_linter_only_asks_for_environments() -> None:
    """Rules run where the project is installed, see docs/decisions.md."""
    done = _snakemake("--lint")
    complaints = [
        line.strip()
        for line in (done.stdout + done.stderr).splitlines()
        if line.strip().startswith("* ")
    ]
    others = [c for c in complaints if "conda environment or container" not in c]
    assert complaints
    assert others == []


def test_the_store_is_never_an_output() -> None:
    """The engine deletes outputs before it runs a rule; a store must survive that."""
    done = _snakemake("--dry-run", "--forceall", "--summary", "demo")
    outputs = [line.split("\t")[0] for line in done.stdout.splitlines()[1:] if line]
    assert "results/caches/demo.json" in outputs
    assert not [name for name in outputs if ".zarr" in name]
