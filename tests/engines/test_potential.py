"""The function that all engines call: against the calculator and finite differences."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from kd_train.evaluation.calculator import StudentCalculator
from kd_train.evaluation.potential import StudentPotential
from pipeline.errors import DataError, SpecError
from tests.engines.conftest import evaluate, save_student
from tests.frames import DEMO
from tests.stores import save_teacher, teacher_normalizer

TEACHER = DEMO / "painn_teacher.safetensors"


@pytest.mark.parametrize("name", ["box", "free"])
def test_energies_are_the_calculators(
    name: str,
    student: Path,
    potential: StudentPotential,
    request: pytest.FixtureRequest,
) -> None:
    atoms = request.getfixturevalue(name)
    result = evaluate(potential, atoms)
    atoms.calc = StudentCalculator(
        student, device="cpu", dtype="float64", forces="gradient"
    )
    assert result.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-9)


def test_forces_and_stress_are_slopes_of_the_energy(
    box: Atoms, potential: StudentPotential
) -> None:
    result = evaluate(potential, box)
    step = 1e-4

    def energy(move: np.ndarray, strain: np.ndarray) -> float:
        atoms = box.copy()
        atoms.positions += move
        atoms.set_cell(box.cell.array @ (np.eye(3) + strain), scale_atoms=False)
        atoms.positions = atoms.positions @ (np.eye(3) + strain)
        return evaluate(potential, atoms).energy

    still, rigid = np.zeros((len(box), 3)), np.zeros((3, 3))
    for atom, axis in ((0, 0), (3, 1), (7, 2)):
        move = still.copy()
        move[atom, axis] = step
        slope = (energy(move, rigid) - energy(-move, rigid)) / (2 * step)
        assert result.forces[atom, axis] == pytest.approx(-slope, abs=1e-6)
    assert result.stress is not None
    for row, column in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)):
        strain = rigid.copy()
        strain[row, column] += step / 2
        strain[column, row] += step / 2
        slope = (energy(still, strain) - energy(still, -strain)) / (2 * step)
        wanted = pytest.approx(slope / box.get_volume(), abs=1e-7)
        assert result.stress[row, column] == wanted
    assert np.abs(result.stress).max() > 1e-3


def test_atoms_may_lie_outside_the_cell_in_any_order(
    box: Atoms, potential: StudentPotential
) -> None:
    first = evaluate(potential, box)
    order = np.random.default_rng(1).permutation(len(box))
    moved = box[order]
    moved.positions += box.cell.array[0] - 2 * box.cell.array[2]
    moved.positions[3] += box.cell.array[1]
    second = evaluate(potential, moved)
    assert second.energy == pytest.approx(first.energy, abs=1e-9)
    np.testing.assert_allclose(second.forces, first.forces[order], atol=1e-9)
    np.testing.assert_allclose(second.virial, first.virial, atol=1e-9)


def test_only_periodic_structures_have_stress(
    free: Atoms, box: Atoms, potential: StudentPotential
) -> None:
    assert evaluate(potential, free).stress is None
    box.pbc = (True, True, False)
    assert evaluate(potential, box).stress is None
    result = evaluate(potential, free)
    wanted = (free.positions.T @ result.forces).T
    np.testing.assert_allclose(result.virial, wanted, atol=1e-8)


def test_many_structures_in_one_pass(
    free: Atoms, box: Atoms, potential: StudentPotential
) -> None:
    parts = [free, box, free]
    structures = [
        potential.structure(a.numbers, a.positions, a.cell.array, a.pbc) for a in parts
    ]
    batch = potential.evaluate_batch(structures)
    single = [evaluate(potential, atoms) for atoms in parts]
    np.testing.assert_allclose(batch.energy, [s.energy for s in single], atol=1e-9)
    wanted = np.concatenate([s.forces for s in single])
    np.testing.assert_allclose(batch.forces, wanted, atol=1e-9)
    np.testing.assert_allclose(batch.virial[1], single[1].virial, atol=1e-9)


def test_a_copy_in_another_process_gives_the_same(
    box: Atoms, potential: StudentPotential
) -> None:
    copy = pickle.loads(pickle.dumps(potential))
    assert evaluate(copy, box).energy == evaluate(potential, box).energy


def test_heads_and_second_scales_are_warned_of_once(tmp_path: Path) -> None:
    gradient = save_student(tmp_path / "gradient.safetensors")
    with pytest.warns(UserWarning, match="energies by 3 and forces by 1.7"):
        StudentPotential(gradient, device="cpu")
    assert teacher_normalizer().force_std == 1.7
    with pytest.warns(UserWarning, match="The student has a force head") as caught:
        StudentPotential(TEACHER, device="cpu")
    assert len(caught) == 1
    StudentPotential(TEACHER, device="cpu", forces="gradient")


@pytest.mark.parametrize("value", ["head", True])
def test_other_options_are_refused(student: Path, value: object) -> None:
    with pytest.raises(SpecError, match="only have 'gradient'"):
        StudentPotential(student, device="cpu", forces=value)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="'float16'"):
        StudentPotential(student, device="cpu", dtype="float16")


def test_structures_without_an_answer_are_refused(
    potential: StudentPotential, tmp_path: Path
) -> None:
    def refused(atoms: Atoms, words: str) -> None:
        with pytest.raises(DataError, match=words):
            evaluate(potential, atoms)

    refused(molecule("CH3NO2"), "held no N")
    refused(Atoms("H"), "No atom has a neighbour within 5.0 Å")
    refused(Atoms("H2", [[0, 0, 0], [0, 0, np.nan]]), "positions")
    refused(Atoms("H2", [[0, 0, 0], [0, 0, 1]], pbc=True), "cell")
    blind = save_teacher(tmp_path / "blind.safetensors", use_pbc=False)
    molecules = StudentPotential(blind, device="cpu", forces="gradient")
    atoms = molecule("CH3OH", cell=[9, 9, 9], pbc=True)
    with pytest.raises(DataError, match="use_pbc: false"):
        evaluate(molecules, atoms)


def test_lone_atoms_and_limits_are_warned_of(tmp_path: Path) -> None:
    path = save_student(tmp_path / "capped.safetensors", max_neighbors=20)
    capped = StudentPotential(path, device="cpu", forces="gradient")
    with pytest.warns(UserWarning, match="more than 20 neighbours"):
        evaluate(capped, bulk("C", "diamond", a=3.6))
    with pytest.warns(UserWarning, match=r"Atom 3 \(H\) has no neighbour"):
        evaluate(capped, molecule("H2O") + Atoms("H", [[30, 0, 0]]))
