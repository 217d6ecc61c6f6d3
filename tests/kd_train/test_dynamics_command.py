"""``kd-eval RUN --dynamics FILE`` as it is typed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ase.build import bulk, molecule
from ase.io import read, write
from click.testing import Result

from kd_train.cli.evaluate import eval_main
from kd_train.dynamics.spec import METRICS, DynamicsSpec, Thresholds
from pipeline.models.checkpoint import save_model
from pipeline.models.zoo import build_model
from pipeline.spec.closed_model import is_model, without_none
from tests.commands import refusal, run_command
from tests.stores import STUDENTS, TINY_PAINN, teacher_normalizer
from tests.test_docs_links import ROOT


@pytest.fixture(scope="module")
def conservative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose forces are the gradient of its energy, of random weights."""
    path = tmp_path_factory.mktemp("conservative") / "schnet.safetensors"
    torch.manual_seed(11)
    model = build_model("schnet", STUDENTS["schnet-demo"])
    normalizer = replace(teacher_normalizer(), energy_std=1.7, force_std=1.7)
    save_model(path, "schnet", model, normalizer, {})
    return path


def dynamics_file(folder: Path, **changes: Any) -> Path:
    """A file for methanol at 300 K; ``changes`` are top-level keys."""
    write(folder / "methanol.xyz", molecule("CH3OH"), format="xyz")
    # Forces of untrained students do not hold a molecule together.
    document: dict[str, Any] = {
        "structure": "methanol.xyz",
        "temperature": 300,
        "timestep": 0.25,
        "steps": 40,
        "replicas": 2,
        "failure": {"close": None, "stretch": None, "heat": None},
    }
    path = folder / "quick.yaml"
    path.write_text(yaml.safe_dump(document | changes))
    return path


def evaluated(run: Path, file: Path, *more: object) -> Result:
    return run_command(eval_main, [run, "--dynamics", file, "--device", "cpu", *more])


def test_a_conservative_student_passes_and_a_direct_one_does_not(
    finished: Path, conservative: Path, tmp_path: Path
) -> None:
    limits = {"work_error": 0.01, "order_error": 0.01, "cell_error": 0.01, "drift": 10}
    file = dynamics_file(tmp_path, thresholds=limits | {"failed_replicas": 0})
    done = evaluated(conservative, file, "--out", tmp_path / "sound")
    assert done.exit_code == 0, done.output
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    done = evaluated(run, file)
    assert done.exit_code == 1
    last = done.stdout.splitlines()[-1]
    assert last.startswith("Threshold work_error: the error of energy against work")
    folder = run / "dynamics" / "quick"
    wanted = {"dynamics.json", "replicas"}
    wanted |= {
        f"{name}.{kind}" for name in ("energy", "rdf") for kind in ("png", "pdf")
    }
    assert {path.name for path in folder.iterdir()} - {".lock"} == wanted
    assert len(list((folder / "replicas").iterdir())) == 4
    found = json.loads((folder / "dynamics.json").read_text())
    assert last in found["exceeded"]
    assert set(found["student"]["metrics"]) == set(METRICS)
    assert found["student"]["ns_per_day"] == pytest.approx(
        0.25e-6 * 86_400_000 / found["student"]["metrics"]["ms_per_step"]
    )
    again = evaluated(run, file, "--json")
    assert "results of an earlier call are replaced" in again.stderr
    told = json.loads(again.stdout)
    for key in ("drift", "work_error", "step_error"):
        assert told["student"]["metrics"][key] == found["student"]["metrics"][key]


def test_gradients_of_a_direct_student_are_conservative(
    finished: Path, tmp_path: Path
) -> None:
    limits = {"work_error": 0.01}
    file = dynamics_file(tmp_path, thresholds=limits, forces="gradient")
    done = evaluated(finished, file, "--out", tmp_path / "gradient")
    assert done.exit_code == 0, done.output


def test_a_teacher_and_a_trajectory_as_reference(
    finished: Path, conservative: Path, tmp_path: Path
) -> None:
    file = dynamics_file(tmp_path, reference={"teacher": str(conservative)})
    out = tmp_path / "first"
    done = evaluated(finished, file, "--out", out)
    assert done.exit_code == 0, done.output
    header = done.stdout.splitlines()[2]
    assert header.split() == ["student", "teacher", "threshold"]
    found = json.loads((out / "dynamics.json").read_text())
    rdf = found["rdf"]
    difference = np.abs(np.subtract(rdf["student"], rdf["reference"])).mean()
    assert found["student"]["metrics"]["rdf_difference"] == pytest.approx(difference)
    assert found["student"]["metrics"]["rdf_difference"] > 0
    # The teacher's frames as the reference of the teacher.
    frames = [
        a for k in (0, 1) for a in read(out / f"replicas/teacher-{k}.extxyz", ":")
    ]
    write(tmp_path / "frames.extxyz", frames)
    limits = {"rdf_difference": 1e-3}
    trajectory = {"trajectory": "frames.extxyz"}
    file = dynamics_file(tmp_path, reference=trajectory, thresholds=limits)
    done = evaluated(conservative, file, "--out", tmp_path / "second")
    assert done.exit_code == 0, done.output
    assert evaluated(finished, file, "--out", tmp_path / "third").exit_code == 1


def test_failed_replicas_are_told(conservative: Path, tmp_path: Path) -> None:
    limits = {"failed_replicas": 1, "drift": 1e9}
    hot = {"temperature": 20_000, "equilibration": 1000, "steps": 10}
    signs = {"stretch": 1.1, "close": None, "heat": None}
    file = dynamics_file(tmp_path, failure=signs, thresholds=limits, **hot)
    done = evaluated(conservative, file, "--out", tmp_path / "out")
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert sum(text.startswith("Failed: student, replica") for text in lines) == 2
    wanted = "Threshold failed_replicas: the number of failed replicas is 2, more than"
    assert f"{wanted} 1." in lines
    assert any(text.startswith("Threshold drift: there is no") for text in lines)
    found = json.loads((tmp_path / "out" / "dynamics.json").read_text())
    replicas = found["student"]["replicas"]
    assert all(r["reason"] for r in replicas)
    assert found["student"]["earliest_failure"] == min(
        r["failed_after"] for r in replicas
    )


@pytest.mark.filterwarnings("ignore:.*neighbours within:UserWarning")
def test_crystals_from_other_files(tmp_path: Path) -> None:
    torch.manual_seed(5)
    path = tmp_path / "painn.safetensors"
    model = build_model("painn", TINY_PAINN | {"direct_forces": False})
    normalizer = replace(teacher_normalizer(), energy_std=1.0, force_std=1.0)
    save_model(path, "painn", model, normalizer, {})
    write(tmp_path / "POSCAR.vasp", bulk("C", "diamond", a=3.6, cubic=True))
    file = dynamics_file(tmp_path, structure="POSCAR.vasp", steps=10)
    done = evaluated(path, file, "--out", tmp_path / "out")
    assert "Warning: 100 % of 8 atoms have more than 20 neighbours" in done.stderr
    found = json.loads((tmp_path / "out" / "dynamics.json").read_text())
    assert found["rdf"]["kind"] == "g"
    assert "supercell" in found["student"]["cell_errors"]


def test_a_student_without_a_list_of_elements_warns(
    finished: Path, tmp_path: Path
) -> None:
    from pipeline.models.normalizer import Normalizer

    bare = tmp_path / "bare.safetensors"
    save_model(bare, "painn", build_model("painn", TINY_PAINN), Normalizer(), {})
    done = evaluated(bare, dynamics_file(tmp_path, steps=10), "--out", tmp_path / "out")
    assert "Warning: The model file does not list the elements" in done.stderr


def test_the_page_has_every_key_and_metric() -> None:
    assert list(Thresholds.model_fields) == list(METRICS)
    page = (ROOT / "docs" / "dynamics.md").read_text()
    names = {f"`{name}`" for name in METRICS}
    for key, field in DynamicsSpec.model_fields.items():
        kind = without_none(field.annotation)
        inner = kind.model_fields if is_model(kind) else {}
        names |= {f"`{key}.{name}`" for name in inner} if inner else {f"`{key}`"}
    names -= {f"`thresholds.{name}`" for name in METRICS}
    assert [name for name in sorted(names) if name not in page] == []


def test_refusals(finished: Path, conservative: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")

    def told(run: Path = finished, **changes: Any) -> str:
        file = dynamics_file(tmp_path, **changes)
        return refusal(eval_main, [run, "--dynamics", file, "--device", "cpu", *out])

    clash = molecule("CH3OH")
    clash.positions[1] = clash.positions[0] + 0.1
    write(tmp_path / "clash.xyz", clash, format="xyz")
    write(tmp_path / "nitro.xyz", molecule("CH3NO2"), format="xyz")
    write(tmp_path / "water.xyz", molecule("H2O"), format="xyz")
    (tmp_path / "odd.cif").write_text("nothing")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"temprature": 3}, "unknown key 'temprature', the nearest known one is 'temp"),
        ({"failure": {"cold": 1}}, "unknown key 'failure.cold'"),
        ({"temperature": 0}, "temperature: Input should be greater than 0, found 0"),
        ({"temperature": -5}, "temperature: Input should be greater than 0, found -5"),
        ({"duration": 1.0}, "set either steps or duration"),
        ({"every": 41}, "every is 41, more than the 40 steps of a replica"),
        ({"steps": None}, "set either steps or duration"),
        ({"structure": "absent.xyz"}, "absent.xyz does not exist"),
        ({"structure": "odd.cif"}, "odd.cif cannot be read by ASE"),
        ({"index": 7}, "no sample left after offset=7"),
        ({"structure": "clash.xyz"}, "are 0.17 Å apart, less than 0.4 times the sum"),
        ({"structure": "nitro.xyz"}, "nitro.xyz holds N"),
        ({"reference": {}}, "set either teacher or trajectory"),
        ({"reference": {"teacher": "absent"}}, "absent does not exist; name a run"),
        ({"reference": {"trajectory": "water.xyz"}}, "frame 0 has another composition"),
        ({"thresholds": {"rdf_difference": 1}}, "needs a reference"),
        ({"thresholds": {"drift": 1}, "ensemble": "langevin"}, "needs ensemble: nve"),
        ({"thresholds": {"drift": -1}}, "thresholds.drift"),
    ]
    for changes, words in cases:
        assert words in told(**changes), changes
    assert "--any-element" in told(structure="nitro.xyz")
    file = dynamics_file(tmp_path)
    commands: list[tuple[list[object], str]] = [
        ([finished], "There is nothing to evaluate on; name --data or --dynamics"),
        ([finished, "--dynamics", tmp_path / "no.yaml"], "no.yaml does not exist"),
        ([tmp_path / "no", "--dynamics", file, *out], "does not exist; name a run"),
        ([tmp_path, "--dynamics", file, *out], "has no student.safetensors"),
        ([conservative, "--dynamics", file], "is not in a run folder"),
        ([finished, "--dynamics", file, "--out", finished], "is a run folder"),
        (
            [finished, "--dynamics", file, "--split", "val"],
            "--split cannot be combined",
        ),
        ([finished, "--dynamics", file, "--data", "x"], "--data cannot be combined"),
    ]
    for words_typed, words in commands:
        assert words in refusal(eval_main, words_typed), words_typed
