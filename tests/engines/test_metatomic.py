"""Files of metatomic: in a process without this package, against the potential."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write
from click.testing import CliRunner

from kd_train.cli.export import export_main
from kd_train.evaluation.metatomic import export_metatomic
from kd_train.evaluation.potential import StudentPotential
from pipeline.errors import CheckpointError, SpecError
from pipeline.models.checkpoint import save_model
from pipeline.models.zoo import build_model
from tests.engines.conftest import evaluate, save_student
from tests.stores import teacher_normalizer

SCHNET = {
    "hidden_channels": 16,
    "num_filters": 16,
    "num_interactions": 2,
    "num_gaussians": 12,
    "cutoff": 5.0,
    "max_neighbors": None,
}
# A program that knows metatomic and ASE alone, and must not find this package.
READER = """
import json, sys
import numpy as np
from ase.io import read
from metatomic.torch import ModelOutput
from metatomic_ase import MetatomicCalculator
assert not {"kd_train", "pipeline", "torch_geometric"} & set(sys.modules)
out = []
calculator = MetatomicCalculator(sys.argv[1], device="cpu", check_consistency=True)
for name in sys.argv[2:]:
    atoms = read(name)
    atoms.calc = calculator
    result = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if atoms.pbc.all():
        result["stress"] = atoms.get_stress(voigt=False)
    asked = {"energy": ModelOutput(unit="eV", sample_kind="atom")}
    found = calculator.run_model(atoms, asked)["energy"].block().values
    result["energies"] = found.detach().numpy()
    out.append({key: np.asarray(value).tolist() for key, value in result.items()})
print(json.dumps(out))
"""
needs_metatomic = pytest.mark.skipif(
    find_spec("metatomic") is None or find_spec("metatomic_ase") is None,
    reason="metatomic-torch or metatomic-ase is not installed",
)


def run_elsewhere(file: Path, structures: list[Atoms], folder: Path) -> list[dict]:
    """Results of ``file`` in a process of metatomic-ase, away from this code."""
    names = []
    for k, atoms in enumerate(structures):
        names.append(str(folder / f"{k}.json"))
        write(names[-1], atoms)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READER, str(file), *names],
        cwd=folder,
        env={"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    results: list[dict] = json.loads(done.stdout.strip().splitlines()[-1])
    return results


def save_schnet(path: Path, **changes: object) -> Path:
    model = build_model("schnet", SCHNET | changes)
    save_model(path, "schnet", model, teacher_normalizer(), {"made": "for tests"})
    return path


@needs_metatomic
@pytest.mark.parametrize("name", ["painn", "schnet"])
def test_a_program_without_this_package_gets_the_same(
    name: str, box: Atoms, free: Atoms, tmp_path: Path
) -> None:
    path = tmp_path / "student.safetensors"
    if name == "painn":
        save_student(path, max_neighbors=None, smooth=True)
    else:
        save_schnet(path)
    file = tmp_path / "student.pt"
    done = CliRunner().invoke(
        export_main, [str(path), "--to", "metatomic", "--out", str(file), "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["largest_deviation"]["energy"] < 1e-9
    potential = StudentPotential(path, device="cpu", forces="gradient")
    structures = [box, free, box.repeat((2, 1, 1))]
    results = run_elsewhere(file, structures, tmp_path)
    for atoms, found in zip(structures, results, strict=True):
        wanted = evaluate(potential, atoms)
        assert found["energy"] == pytest.approx(wanted.energy, abs=1e-9)
        np.testing.assert_allclose(found["forces"], wanted.forces, atol=1e-8)
        assert np.sum(found["energies"]) == pytest.approx(wanted.energy, abs=1e-9)
        assert len(found["energies"]) == len(atoms)
        if wanted.stress is not None:
            size = np.abs(wanted.stress).max()
            np.testing.assert_allclose(
                found["stress"], wanted.stress, rtol=0, atol=1e-8 * size
            )


@needs_metatomic
def test_students_that_metatomic_cannot_express_are_refused(
    student: Path, tmp_path: Path
) -> None:
    file = tmp_path / "student.pt"
    with pytest.raises(CheckpointError, match="at most 10000 neighbours of an atom"):
        export_metatomic(student, file)
    mean = save_schnet(tmp_path / "mean.safetensors", readout="mean")
    with pytest.raises(CheckpointError, match="readout: mean"):
        export_metatomic(mean, file)
    with pytest.raises(SpecError, match="'float16'; choose one of float32, float64"):
        export_metatomic(student, file, dtype="float16")
    assert not file.exists()


def test_a_missing_extra_is_named(student: Path, tmp_path: Path) -> None:
    if find_spec("metatomic") is not None:
        pytest.skip("metatomic-torch is installed")
    with pytest.raises(SpecError, match=r"pip install 'kd-train\[metatomic\]'"):
        export_metatomic(student, tmp_path / "student.pt")
