"""TorchSim with a student: its own checks, numbers of a batch, and dynamics."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule

from kd_train.evaluation.potential import StudentPotential
from pipeline.errors import DataError
from tests.engines.conftest import Reference, evaluate, total_energies
from tests.frames import DEMO

ts = pytest.importorskip("torch_sim")
from torch_sim.models.interface import validate_model_outputs  # noqa: E402

from kd_train.torch_sim import StudentModel  # noqa: E402

CPU = torch.device("cpu")
TEACHER = DEMO / "painn_teacher.safetensors"


def model_of(student: Path, **options: Any) -> StudentModel:
    return StudentModel(student, device="cpu", forces="gradient", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_passes_the_checks_of_torch_sim(student: Path, dtype: torch.dtype) -> None:
    model = model_of(student, dtype=dtype, any_element=True)
    validate_model_outputs(model, CPU, dtype)


@pytest.mark.parametrize("name", ["box", "free"])
def test_energy_forces_and_stress_of_a_batch(
    name: str,
    student: Path,
    potential: StudentPotential,
    request: pytest.FixtureRequest,
) -> None:
    first = request.getfixturevalue(name)
    second = first[:6] if name == "box" else molecule("H2O")
    second.positions[0] += 0.1
    parts = [first, second, first]
    state = ts.io.atoms_to_state(parts, CPU, torch.float64)
    as_dict = {
        key: getattr(state, key)
        for key in ("positions", "cell", "pbc", "atomic_numbers", "system_idx")
    }
    model = model_of(student)
    wanted = [evaluate(potential, atoms) for atoms in parts]
    for result in (model(state), model(as_dict)):
        energies = [w.energy for w in wanted]
        np.testing.assert_allclose(result["energy"], energies, atol=1e-9)
        forces = np.concatenate([w.forces for w in wanted])
        np.testing.assert_allclose(result["forces"], forces, atol=1e-8)
        for stress, w in zip(result["stress"], wanted, strict=True):
            expected = np.zeros((3, 3)) if w.stress is None else w.stress
            np.testing.assert_allclose(stress, expected, rtol=1e-8, atol=1e-12)
    model.compute_forces = model.compute_stress = False
    assert list(model(state)) == ["energy"]


def test_the_drift_is_that_of_ase(
    warm_methanol: Atoms, trained: StudentPotential
) -> None:
    """TorchSim draws its own velocities, so ASE begins with those."""
    model = model_of(TEACHER)
    state = ts.io.atoms_to_state([warm_methanol], CPU, torch.float64)
    dt = torch.tensor(0.25e-3 * ts.units.MetalUnits.time, dtype=torch.float64)
    temperature = torch.tensor(300 * units.kB, dtype=torch.float64)
    begin, update = ts.integrators.nve(model, dt=dt, kT=temperature, seed=1)
    state = begin(state)
    atoms = warm_methanol.copy()
    atoms.set_masses(state.masses.numpy())
    atoms.set_momenta(state.momenta.numpy())
    atoms.calc = Reference(trained)
    wanted = np.array(total_energies(atoms, 60, 0.25))
    totals = []
    for _ in range(61):
        kinetic = (state.momenta.square().sum(dim=1) / (2 * state.masses)).sum()
        totals.append(float(state.energy + kinetic))
        state = update(state)
    np.testing.assert_allclose(totals, wanted, atol=2e-6)


def test_what_the_student_does_not_know_is_refused(student: Path) -> None:
    state = ts.io.atoms_to_state([molecule("CH3NO2")], CPU, torch.float64)
    with pytest.raises(DataError, match="held no N"):
        model_of(student)(state)
