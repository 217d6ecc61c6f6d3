"""OpenMM with a student: through the entry point, whole systems and parts."""

from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule

from kd_train.evaluation.potential import StudentPotential
from pipeline.errors import DataError, SpecError
from tests.engines.conftest import evaluate

openmm = pytest.importorskip("openmm")
openmmml = pytest.importorskip("openmmml")
from openmm import app, unit  # noqa: E402

# kJ/mol of an eV, and of an eV/Å in kJ/mol/nm.
EV = 96.48533212331001


def topology_of(atoms: Atoms) -> Any:
    topology = app.Topology()
    residue = topology.addResidue("all", topology.addChain())
    for k, symbol in enumerate(atoms.symbols):
        element = app.Element.getBySymbol(symbol)
        topology.addAtom(f"{symbol}{k}", element, residue)
    if atoms.pbc.all():
        topology.setPeriodicBoxVectors(atoms.cell.array * unit.angstrom)
    return topology


def context_of(system: Any, atoms: Atoms, integrator: Any = None) -> Any:
    integrator = integrator or openmm.VerletIntegrator(0.25 * unit.femtosecond)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, integrator, platform)
    context.setPositions(atoms.positions * unit.angstrom)
    return context


def results(context: Any, **options: Any) -> tuple[float, np.ndarray]:
    """Energy (eV) and forces (N, 3) in eV/Å."""
    state = context.getState(getEnergy=True, getForces=True, **options)
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    forces = state.getForces(asNumpy=True)
    forces = forces.value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    return energy / EV, forces / EV / 10


@pytest.fixture
def ml(potential: StudentPotential) -> Any:
    return openmmml.MLPotential("kd-train", model=potential)


@pytest.mark.parametrize("name", ["box", "free"])
def test_energy_and_forces(
    name: str, ml: Any, potential: StudentPotential, request: pytest.FixtureRequest
) -> None:
    atoms = request.getfixturevalue(name)
    system = ml.createSystem(topology_of(atoms))
    # The system in another process, with the student in it.
    text = openmm.XmlSerializer.serialize(system)
    for each in (system, openmm.XmlSerializer.deserialize(text)):
        energy, forces = results(context_of(each, atoms))
        wanted = evaluate(potential, atoms)
        assert energy == pytest.approx(wanted.energy, abs=1e-9)
        np.testing.assert_allclose(forces, wanted.forces, atol=1e-8)


def test_the_drift_is_that_of_ase(
    warm_methanol: Atoms, drift: np.ndarray, trained: StudentPotential
) -> None:
    ml = openmmml.MLPotential("kd-train", model=trained)
    system = ml.createSystem(topology_of(warm_methanol), removeCMMotion=False)
    for k, mass in enumerate(warm_methanol.get_masses()):
        system.setParticleMass(k, mass)
    # Velocities of OpenMM's Verlet are half a step behind, so this writes its own.
    integrator = openmm.CustomIntegrator(0.25 * unit.femtosecond)
    integrator.addComputePerDof("v", "v+0.5*dt*f/m")
    integrator.addComputePerDof("x", "x+dt*v")
    integrator.addComputePerDof("v", "v+0.5*dt*f/m")
    context = context_of(system, warm_methanol, integrator)
    # ASE has velocities in Å by √(amu/eV) Å, OpenMM in nm/ps = √(kJ/mol/amu).
    velocities = warm_methanol.get_velocities() * np.sqrt(EV)
    context.setVelocities(velocities * unit.nanometer / unit.picosecond)
    totals = []
    for step in range(11):
        integrator.step(20 if step else 0)
        state = context.getState(getEnergy=True)
        total = state.getPotentialEnergy() + state.getKineticEnergy()
        totals.append(total.value_in_unit(unit.kilojoule_per_mole) / EV)
    change = np.array(totals) - totals[0]
    np.testing.assert_allclose(change, drift[::20], atol=2e-6)


def test_a_barostat_runs(box: Atoms, ml: Any) -> None:
    system = ml.createSystem(topology_of(box))
    system.addForce(openmm.MonteCarloBarostat(1 * unit.bar, 300 * unit.kelvin, 2))
    integrator = openmm.LangevinMiddleIntegrator(
        300 * unit.kelvin, 10 / unit.picosecond, 0.25 * unit.femtosecond
    )
    context = context_of(system, box, integrator)
    integrator.step(40)
    volume = context.getState().getPeriodicBoxVolume()
    assert volume.value_in_unit(unit.angstrom**3) != pytest.approx(box.get_volume())


def test_a_student_for_a_part_of_a_system(ml: Any, potential: StudentPotential) -> None:
    """The part has the student alone, and the bond across stays."""
    atoms = molecule("H2O") + molecule("CH3OH")
    atoms.positions[3:] += [6.0, 0.0, 0.0]
    mechanics = openmm.System()
    bonds = openmm.HarmonicBondForce()
    for mass in atoms.get_masses():
        mechanics.addParticle(mass)
    bonds.addBond(0, 1, 0.1, 1000.0)
    bonds.addBond(4, 5, 0.1, 1000.0)
    mechanics.addForce(bonds)
    topology = topology_of(atoms)
    system = ml.createMixedSystem(topology, mechanics, range(3, 9), forceGroup=1)
    context = context_of(system, atoms)
    energy, forces = results(context, groups={1})
    part = evaluate(potential, atoms[3:])
    assert energy == pytest.approx(part.energy, abs=1e-9)
    np.testing.assert_allclose(forces[3:], part.forces, atol=1e-8)
    assert not forces[:3].any()
    stretched = atoms.get_distance(0, 1) / 10 - 0.1
    total, _ = results(context)
    wanted = part.energy + 500.0 * stretched**2 / EV
    assert total == pytest.approx(wanted, abs=1e-7)


def test_what_the_student_does_not_know_is_refused(ml: Any, free: Atoms) -> None:
    with pytest.raises(DataError, match="The topology holds N; the data"):
        ml.createSystem(topology_of(molecule("CH3NO2")))
    topology = topology_of(free)
    next(topology.atoms()).element = None
    with pytest.raises(SpecError, match="Atom 0 of the topology has no element"):
        ml.createSystem(topology)


def test_an_error_ends_the_run(ml: Any, free: Atoms) -> None:
    context = context_of(ml.createSystem(topology_of(free)), free)
    far = np.arange(9)[:, None] * [50.0, 0.0, 0.0]
    context.setPositions(far * unit.angstrom)
    with pytest.raises(openmm.OpenMMException, match="No atom has a neighbour within"):
        context.getIntegrator().step(5)
