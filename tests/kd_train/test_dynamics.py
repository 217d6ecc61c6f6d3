"""Measurements of ``kd-eval --dynamics`` on potentials whose answers are known."""

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.morse import MorsePotential
from ase.constraints import FixAtoms
from ase.geometry.rdf import get_rdf
from ase.io import read

from kd_train.dynamics.checks import cell_errors, order_error, work_error
from kd_train.dynamics.measure import Potential, measure
from kd_train.dynamics.rdf import check_comparable, radial_distribution
from kd_train.dynamics.replicas import Replica, draw_velocities, run_replica
from kd_train.dynamics.results import Results
from kd_train.dynamics.run import measure_all
from kd_train.dynamics.spec import DynamicsSpec
from kd_train.dynamics.structures import to_structure
from pipeline.errors import DataError

Energy = Callable[[Atoms], float]
Forces = Callable[[Atoms], np.ndarray]


class Formula(Calculator):
    """A calculator of two plain functions."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, energy: Energy, forces: Forces) -> None:
        super().__init__()
        self._energy, self._forces = energy, forces

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        energy, forces = self._energy(self.atoms), self._forces(self.atoms)
        self.results = {"energy": energy, "forces": forces}


class Swirl(MorsePotential):
    """Morse's potential with a force that no energy has: a push around an axis."""

    def calculate(self, *args: Any, **kwargs: Any) -> None:
        super().calculate(*args, **kwargs)
        x, y, _ = (self.atoms.positions - self.atoms.positions.mean(0)).T
        self.results["forces"] += 0.3 * np.stack([-y, x, 0 * x], 1)


def nothing(_: Atoms) -> float:
    return 0.0


def no_forces(atoms: Atoms) -> np.ndarray:
    return np.zeros((len(atoms), 3))


def spec(**changes: Any) -> DynamicsSpec:
    document = {"structure": "-", "temperature": 300, "steps": 200, "replicas": 2}
    return DynamicsSpec.model_validate(document | {"timestep": 1.0} | changes)


def trimer() -> Atoms:
    """Three argon-like atoms at the distance that Morse's potential likes best."""
    height = np.sqrt(3) / 2
    places = np.array([[0, 0, 0], [1, 0, 0], [0.5, height, 0]]) * 2.0
    return Atoms("Ar3", places)


def morse(kind: type[MorsePotential] = MorsePotential) -> MorsePotential:
    return kind(epsilon=1.0, rho0=4.0, r0=2.0, rcut1=8.0, rcut2=9.0)


def results_of(
    calculator: Calculator, atoms: Atoms, chosen: DynamicsSpec, out: Path
) -> Results:
    student = Potential("student", calculator, calculator)
    return measure_all(Path("run"), chosen, atoms, [student], None, out)


def test_drift_is_found_where_forces_are_not_a_gradient(tmp_path: Path) -> None:
    limits = {"drift": 1.0, "energy_range": 5.0, "work_error": 0.01, "step_error": 1.0}
    chosen = spec(thresholds=limits)
    sound = results_of(morse(), trimer(), chosen, tmp_path / "sound")
    assert sound.faults() == []
    assert abs(sound.student_metrics()["drift"]) < 0.5
    bad = results_of(morse(Swirl), trimer(), chosen, tmp_path / "bad")
    assert [text.split()[1] for text in bad.faults()] == [f"{k}:" for k in limits]
    # The range of a trajectory's energies against numpy's of its kept file.
    with np.load(tmp_path / "bad" / "replicas" / "student-1.npz") as file:
        kept = dict(file)
    total = 1000 * (kept["potential"] + kept["kinetic"]) / 3
    replica = bad.student.replicas[1]
    assert replica.energy_range(3) == pytest.approx(np.ptp(total))
    assert replica.drift(3) == pytest.approx(np.polyfit(kept["time"], total, 1)[0])


def test_drift_of_a_known_slope() -> None:
    time = [0.0, 0.1, 0.2, 0.3]
    replica = Replica(0, time, [2.0 * t + 5 for t in time], [t for t in time])
    assert replica.drift(4) == pytest.approx(750.0)
    assert replica.energy_range(4) == pytest.approx(225.0)
    assert Replica(0, [0.0], [1.0], [1.0]).drift(4) is None


def test_work_of_springs_is_exact_and_errors_are_found() -> None:
    atoms = molecule("CH3OH")
    atoms.rattle(0.1, seed=1)
    home = molecule("CH3OH").positions

    def energy(a: Atoms) -> float:
        return 2.5 * float(((a.positions - home) ** 2).sum())

    def forces(a: Atoms) -> np.ndarray:
        return -5.0 * (a.positions - home)

    sound = Formula(energy, forces)
    assert work_error(atoms, sound, 50, 0.01, seed=0) < 1e-9
    # Forces 1 % too large: the error is 1 % of the largest change of energy.
    random = np.random.default_rng([0, 1])
    walk = 0.01 * random.standard_normal((50, *home.shape))
    places = atoms.positions + np.concatenate([0 * walk[:1], np.cumsum(walk, 0)])
    energies = 2.5 * ((places - home) ** 2).sum((1, 2))
    wanted = 10 * np.abs(np.diff(energies)).max()
    wrong = Formula(energy, lambda a: 1.01 * forces(a))
    assert work_error(atoms, wrong, 50, 0.01, seed=0) == pytest.approx(wanted, rel=1e-6)
    # An energy that jumps by 0.3 eV in the step in which an atom passes a plane.
    edge = places[25:27, 0, 0].mean()
    jumps = Formula(lambda a: energy(a) + 0.3 * (a.positions[0, 0] > edge), forces)
    assert work_error(atoms, jumps, 50, 0.01, seed=0) == pytest.approx(300.0)
    broken = Formula(lambda _: np.nan, forces)
    assert work_error(atoms, broken, 2, 0.01, seed=0) == np.inf


def test_fixed_atoms_do_no_work() -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.set_constraint(FixAtoms([0]))
    assert work_error(atoms, EMT(), 10, 1e-3, seed=0) < 1e-3
    chosen = spec(steps=20)
    found = run_replica(atoms, EMT(), chosen, 0, lambda _: None)
    assert found.reason is None
    moved = found.frames[-1] - atoms.positions
    assert not moved[0].any()
    assert np.abs(moved[1:]).min() > 0


def test_dependence_on_the_order_of_atoms() -> None:
    water = molecule("H2O")
    assert order_error(water, morse(), seed=0) < 1e-9
    # An energy of the element that comes first: oxygen and hydrogen are 7 apart.
    first = Formula(lambda a: 0.002 * a.numbers[0], no_forces)
    assert order_error(water, first, seed=0) == pytest.approx(14.0)


def test_dependence_on_the_cell() -> None:
    copper = bulk("Cu", cubic=True) * (2, 1, 1)
    copper.rattle(0.05, seed=2)
    found = cell_errors(copper, EMT(), seed=0)
    assert set(found) == {"lattice vectors", "wrapped", "basis", "supercell"}
    assert max(found.values()) < 1e-8
    # The volume counts twice in two cells; its square does not.
    volume = copper.get_volume()
    square = Formula(lambda a: 1e-6 * a.get_volume() ** 2, no_forces)
    found = cell_errors(copper, square, seed=0)
    assert found["supercell"] == pytest.approx(1e-3 * volume**2)
    assert found["basis"] == pytest.approx(0, abs=1e-9)
    corner = Formula(lambda a: 0.01 * float(a.positions.sum()), no_forces)
    assert cell_errors(copper, corner, seed=0)["lattice vectors"] > 1
    edges = Formula(lambda a: 0.01 * float(a.cell.lengths().sum()), no_forces)
    wanted = 10 * 3.61 * (np.sqrt(5) - 1)
    assert cell_errors(copper, edges, seed=0)["basis"] == pytest.approx(wanted)


def test_molecules_have_no_cell() -> None:
    water = molecule("H2O")
    assert max(cell_errors(water, morse(), seed=0).values()) < 1e-9
    shifted = Formula(lambda a: 0.1 * a.positions[0, 2], no_forces)
    assert cell_errors(water, shifted, seed=0)["shift"] == pytest.approx(570.0)
    boxed = Formula(lambda a: 1e-6 * abs(np.linalg.det(a.cell.array)), no_forces)
    assert cell_errors(water, boxed, seed=0)["box"] == pytest.approx(216.0)


def test_the_time_of_a_failure() -> None:
    """Atoms without forces fly apart: the bond's length at any time is known."""
    atoms = Atoms("N2", [[0, 0, 0], [0, 0, 1.1]])
    free = Formula(nothing, no_forces)
    chosen = spec(temperature=2000, every=1, steps=500)
    found = run_replica(atoms, free, chosen, 0, lambda _: None)
    start = atoms.copy()
    draw_velocities(start, 2000, np.random.default_rng([0, 0, 0]))
    step = units.fs * np.arange(501)[:, None]
    bond = np.array([0, 0, 1.1]) + step * np.diff(start.get_velocities(), axis=0)
    first = int(np.argmax(np.linalg.norm(bond, axis=1) > 1.5 * 1.1))
    close = int(np.argmax(np.linalg.norm(bond, axis=1) < 0.5 * 1.42))
    wanted = min(k for k in (first, close) if k > 0)
    assert found.failed_after == pytest.approx(wanted / 1000)
    assert "of atoms" in str(found.reason) or "apart" in str(found.reason)
    assert len(found.time) == len(found.frames) == wanted
    lenient = spec(temperature=2000, steps=50, failure={"stretch": None, "close": None})
    assert run_replica(atoms, free, lenient, 0, lambda _: None).reason is None


def test_what_fails_a_replica() -> None:
    atoms = trimer()

    def reason(forces: Forces, **changes: Any) -> str:
        calculator = Formula(nothing, forces)
        found = run_replica(atoms, calculator, spec(**changes), 0, lambda _: None)
        return str(found.reason)

    def inwards(a: Atoms) -> np.ndarray:
        return -3.0 * (a.positions - a.positions.mean(0))

    def refuse(a: Atoms) -> np.ndarray:
        if np.abs(a.positions - atoms.positions).max() > 0.05:
            raise DataError("Too far.")
        return no_forces(a)

    assert "apart" in reason(inwards, every=1, failure={"heat": None})
    assert "temperature is" in reason(inwards, every=200)

    def hole(a: Atoms) -> np.ndarray:
        return np.full((3, 3), np.nan if a.positions[0, 0] != 0 else 0.0)

    assert "not finite" in reason(hole)
    assert reason(refuse) == "the student refuses the atoms: Too far"


def test_replicas_repeat_and_differ(tmp_path: Path) -> None:
    for ensemble in ("nve", "langevin"):
        chosen = spec(ensemble=ensemble, steps=20, equilibration=7, every=5)
        ticks: list[int] = []
        first = run_replica(trimer(), morse(), chosen, 0, ticks.append)
        again = run_replica(trimer(), morse(), chosen, 0, ticks.append)
        other = run_replica(trimer(), morse(), chosen, 1, ticks.append)
        assert sum(ticks) == 3 * 27
        assert len(first.time) == 21
        assert len(first.frames) == 5
        assert np.array_equal(first.frames, again.frames)
        assert first.potential == again.potential
        assert np.abs(first.frames[0] - other.frames[0]).min() > 1e-6
        assert first.timed_steps == 26


def test_velocities_have_the_temperature() -> None:
    atoms = molecule("CH3OH")
    draw_velocities(atoms, 450.0, np.random.default_rng(0))
    assert atoms.get_temperature() == pytest.approx(450.0)
    np.testing.assert_allclose(atoms.get_momenta().sum(0), 0, atol=1e-12)


def test_a_kill_leaves_finished_replicas(tmp_path: Path) -> None:
    chosen = spec(steps=20, replicas=3, every=5)
    left = 50

    def tick(steps: int) -> None:
        nonlocal left
        left -= steps
        if left < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        potential = Potential("student", morse(), morse())
        measure(potential, trimer(), chosen, tmp_path, tick)
    names = [f"student-{k}.{kind}" for k in (0, 1) for kind in ("extxyz", "npz")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    frames = read(tmp_path / "student-1.extxyz", ":")
    wanted = run_replica(trimer(), morse(), chosen, 1, lambda _: None).frames
    np.testing.assert_allclose([a.positions for a in frames], wanted, atol=1e-7)


def brute_force(atoms: Atoms, r_max: float, bins: int) -> np.ndarray:
    """Counts of directed pairs, image by image."""
    counts = np.zeros(bins)
    reach = range(-3, 4)
    for shift in product(*(reach if p else [0] for p in atoms.pbc)):
        steps = atoms.positions[None] + shift @ atoms.cell.array
        distances = np.linalg.norm(steps - atoms.positions[:, None], axis=2)
        if not any(shift):
            distances = distances[~np.eye(len(atoms), dtype=bool)]
        counts += np.histogram(distances, bins, (0, r_max))[0]
    return counts


def test_radial_distribution_of_a_small_cell_is_brute_force() -> None:
    atoms = bulk("NaCl", "rocksalt", a=5.6)
    atoms.rattle(0.1, seed=3)
    found = radial_distribution([to_structure(atoms)], 6.0, 30)
    edges = np.linspace(0, 6, 31)
    density = 2 / atoms.get_volume()
    ideal = 2 * density * 4 / 3 * np.pi * np.diff(edges**3)
    np.testing.assert_allclose(found.values, brute_force(atoms, 6.0, 30) / ideal)
    assert found.is_g


def test_radial_distribution_is_that_of_ase() -> None:
    frames = []
    for seed in (1, 2):
        atoms = bulk("Cu", cubic=True) * (4, 4, 4)
        atoms.rattle(0.1, seed=seed)
        frames.append(atoms)
    found = radial_distribution([to_structure(a) for a in frames], 6.0, 60)
    wanted, r = np.mean([get_rdf(a, 6.0, 60) for a in frames], axis=0)
    np.testing.assert_allclose(found.r, r)
    # Shells of 4πr²dr, which earlier versions of ASE have, differ by dr²/12r².
    np.testing.assert_allclose(found.values, wanted, rtol=3e-4)


def test_distances_of_molecules_and_slabs() -> None:
    water = molecule("H2O")
    found = radial_distribution([to_structure(water)], 5.0, 50)
    assert not found.is_g
    assert found.values.sum() * 0.1 == pytest.approx(1.0)
    assert np.flatnonzero(found.values).tolist() == [9, 15]
    assert found.values[9] == pytest.approx(2 * found.values[15])
    slab = Atoms("Cu2", [[0, 0, 0], [1.3, 1.2, 1.5]], cell=[3, 3, 20], pbc=(1, 1, 0))
    found = radial_distribution([to_structure(slab)], 5.0, 25)
    counts = brute_force(slab, 5.0, 25)
    np.testing.assert_allclose(found.values, counts / counts.sum() / 0.2)
    assert found.difference(found) == 0
    with pytest.raises(DataError, match="another composition"):
        check_comparable(to_structure(water), to_structure(molecule("CO")), "b.xyz")
    with pytest.raises(DataError, match="differ in periodicity"):
        box = molecule("H2O", cell=[9, 9, 9], pbc=True)
        check_comparable(to_structure(water), to_structure(box), "b.xyz")
