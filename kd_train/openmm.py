"""A student in OpenMM: the potential ``kd-train`` of OpenMM-ML.

OpenMM-ML finds it through the entry point ``openmmml.potentials``:
``MLPotential("kd-train", model="runs/v2v").createSystem(topology)``.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_train.evaluation.potential import StudentPotential
from pipeline.errors import SpecError

try:
    import openmm
    from openmm import unit
    from openmmml.mlpotential import MLPotentialImpl, MLPotentialImplFactory
except ImportError as error:
    raise ImportError(
        f"OpenMM and OpenMM-ML cannot be imported ({error}); install them with "
        "`pip install 'kd-train[openmm]'`."
    ) from error

# kJ/mol of one eV, from the elementary charge and Avogadro's number (SI 2019).
_EV = 1.602176634e-19 * 6.02214076e23 / 1000
_ANGSTROMS_PER_NM = 10.0


class StudentFactory(MLPotentialImplFactory):
    """Factory of the entry point ``kd-train``."""

    def createImpl(
        self, name: str, *, model: str | Path | StudentPotential, **options: Any
    ) -> "StudentImpl":
        """Return the implementation of the student ``model``.

        ``options`` are ``device``, ``dtype``, ``any_element`` and ``forces`` of
        `StudentPotential`, whose errors are raised.
        """
        if not isinstance(model, StudentPotential):
            model = StudentPotential(model, **options)
        return StudentImpl(model)


class StudentImpl(MLPotentialImpl):
    """Implementation that adds a student to systems of OpenMM, whole or in part."""

    def __init__(self, potential: StudentPotential) -> None:
        self.potential = potential

    def getMLLongRange(self) -> bool:
        """Return False: students see neighbours within their cutoff."""
        return False

    def addForces(
        self,
        topology: Any,
        system: Any,
        atoms: Iterable[int] | None,
        forceGroup: int,
        **args: Any,
    ) -> None:
        """Add the student to ``system``, for all particles or those in ``atoms``.

        Raises
        ------
        SpecError
            An atom of the topology has no element.
        DataError
            The student does not know an element, or ignores the periodic box.
        """
        chosen = None if atoms is None else [int(index) for index in atoms]
        numbers = _numbers(topology, chosen)
        self.potential.check_elements(numbers, "The topology")
        box = topology.getPeriodicBoxVectors() is not None
        periodic = box or system.usesPeriodicBoundaryConditions()
        self.potential.check_periodicity(np.full(3, periodic))
        compute = partial(
            _compute, potential=self.potential, numbers=numbers, periodic=periodic
        )
        force = openmm.PythonForce(compute)
        force.setForceGroup(forceGroup)
        force.setUsesPeriodicBoundaryConditions(periodic)
        if chosen is not None:
            force.setParticles(chosen)
        system.addForce(force)


def _numbers(topology: Any, chosen: list[int] | None) -> npt.NDArray[np.int64]:
    """Return atomic numbers (N,) of the atoms whose indices are in ``chosen``."""
    atoms = list(topology.atoms())
    atoms = atoms if chosen is None else [atoms[index] for index in chosen]
    bare = [atom.index for atom in atoms if atom.element is None]
    if bare:
        raise SpecError(
            f"Atom {bare[0]} of the topology has no element, so the student cannot "
            "evaluate it; set its element, or leave it to the force field."
        )
    return np.array([atom.element.atomic_number for atom in atoms], np.int64)


def _compute(
    state: Any,
    potential: StudentPotential,
    numbers: npt.NDArray[np.int64],
    periodic: bool,
) -> tuple[float, npt.NDArray[np.float64]]:
    """Return energy in kJ/mol and forces (N, 3) in kJ/mol/nm; OpenMM calls it."""
    positions = state.getPositions(asNumpy=True).value_in_unit(unit.angstrom)
    cell = np.zeros((3, 3))
    if periodic:
        vectors = state.getPeriodicBoxVectors(asNumpy=True)
        cell = vectors.value_in_unit(unit.angstrom)
    result = potential.evaluate(numbers, positions, cell, np.full(3, periodic))
    return result.energy * _EV, result.forces * (_EV * _ANGSTROMS_PER_NM)
