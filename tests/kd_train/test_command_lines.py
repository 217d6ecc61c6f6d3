"""What all programs have in common: help, versions, names of options, JSON."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from kd_train.cli.evaluate import eval_main
from kd_train.cli.export import export_main
from kd_train.cli.report import cka_main, report_main
from kd_train.cli.train import main as train_main
from kd_train.sweep.cli import main as sweep_main
from pipeline.cli.main import main as cache_main
from pipeline.store.reader import FeatureStore
from tests.commands import refusal, run_command
from tests.kd_train.runs import make_run
from tests.stores import train_config

PROGRAMS = {
    "kd-cache": cache_main,
    "kd-train": train_main,
    "kd-eval": eval_main,
    "kd-report": report_main,
    "kd-cka": cka_main,
    "kd-export": export_main,
    "kd-sweep": sweep_main,
}


def _commands() -> Iterator[tuple[str, click.Command]]:
    for name, program in PROGRAMS.items():
        if isinstance(program, click.Group):
            for part, command in program.commands.items():
                yield f"{name} {part}", command
        else:
            yield name, program


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_have_help_and_version(name: str) -> None:
    assert run_command(PROGRAMS[name], ["-h"]).exit_code == 0
    shown = run_command(PROGRAMS[name], ["--version"])
    assert "0.1.0" in shown.stdout


def test_every_option_has_a_help_text() -> None:
    for name, command in _commands():
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, (name, option.name)
                assert option.help[0].isupper(), (name, option.name)


def test_sections_name_every_command_once() -> None:
    shown = run_command(cache_main, ["--help"]).stdout
    for title in ("Make a store", "Look at a store", "Convert", "Use a teacher"):
        assert title in shown
    lines = [line.split()[0] for line in shown.splitlines() if line.startswith("  ")]
    assert all(lines.count(name) == 1 for name in cache_main.commands)


def test_help_of_training_imports_no_torch() -> None:
    program = (
        "import sys; from kd_train.cli.train import main\n"
        "try: main(['--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE)


def test_resume_takes_a_mode_and_the_old_flags_mean_the_same(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    config = tmp_path / "c.yaml"
    config.write_text(
        "{batch_size: 16, eval_every: 2, steps: 2, student: {preset: painn-small-demo}}"
    )
    common = ["--store", small_store.path, "--config", config, "--out", out]
    common += ["--device", "cpu"]
    assert "last.pt does not exist" in refusal(
        train_main, [*common, "--resume", "always"]
    )
    first = run_command(train_main, [*common, "--resume", "auto", "--json"])
    found = json.loads(first.stdout)
    assert found["folder"] == str(out)
    assert found["metrics"]["energy_mae"] > 0
    assert "add --resume" in refusal(train_main, common)
    assert "add --resume" in refusal(train_main, [*common, "--resume", "never"])
    for more in (["--resume"], ["--resume", "--json"], ["--auto-resume"]):
        assert run_command(train_main, [*common, *more]).exit_code == 0
    wrong = run_command(train_main, [*common, "--resume", "perhaps"])
    assert wrong.exit_code == 2


def test_results_are_printed_as_json(
    small_store: FeatureStore, small_spec: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    make_run(small_store, run, train_config(steps=2, eval_every=2)).train(resume=False)
    store = str(small_store.path)

    planned = _json(cache_main, "plan", small_spec, "--out", tmp_path / "p.zarr")
    blocks = {name: split.n_blocks for name, split in small_store.splits.items()}
    passes = {
        name: {"labels": len(split), "force_jacobian": 0, "generation": 0}
        for name, split in small_store.splits.items()
    }
    assert planned == {
        "store": str(tmp_path / "p.zarr"),
        "blocks": blocks,
        "teacher_passes": passes,
    }
    assert _json(cache_main, "build", small_spec) == {"store": store, "sealed": True}
    checked = _json(cache_main, "verify", store)
    assert checked == {"store": store, "problems": []}
    table = _json(report_main, run, "--out", tmp_path / "report")
    rows = {row["strategy"]: row for row in table["rows"]}
    assert rows.keys() == {"teacher", "none"}
    assert isinstance(rows["none"]["energy_mae"], float)
    similar = [run, "teacher", "--out", tmp_path / "cka", "--store", store]
    once = _json(cka_main, *similar, "--split", "train+val", "--device", "cpu")
    twice = _json(cka_main, *similar, "--split", "train", "--split", "val")
    assert once["split"] == twice["split"] == "train+val"
    assert len(once["matrix"]) == len(once["first_layers"])
    joined = _json(eval_main, run, "--store", store, "--split", "train+val")
    assert list(joined["splits"]) == ["train+val"]
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"{{store: {store}, out: out, students: [painn-small-demo], "
        "strategies: [none, per_atom_energy]}"
    )
    states = _json(sweep_main, "list", sweep)["runs"]
    assert states == {
        f"painn-small-demo-{name}-s0": "waiting" for name in ("none", "vanilla2")
    }


def test_convert_is_the_command_behind_compact_and_hydrate(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    store = small_store.path
    loose = ["--max-relative-error", "0.01"]
    for old, more in (("compact", loose), ("compact", []), ("hydrate", [])):
        profile = {"compact": "compact", "hydrate": "faithful"}[old]
        outs = [tmp_path / f"{old}{len(more)}{n}.zarr" for n in range(2)]
        new = ["convert", store, outs[1], "--profile", profile, *more]
        for arguments in ([old, store, outs[0], *more], new):
            assert run_command(cache_main, arguments).exit_code == 0
        first, second = map(FeatureStore.open, outs)
        assert first.fingerprint == second.fingerprint


def _json(program: click.Command, *arguments: object) -> dict[str, Any]:
    """What ``program`` prints with ``--json``, which is nothing but JSON."""
    result = run_command(program, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found
