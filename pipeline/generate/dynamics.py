"""Frames of Langevin dynamics with the teacher, by ASE's integrator."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.constraints import FixAtoms
from ase.md.langevin import Langevin

from pipeline.errors import DataError
from pipeline.generate.method import Copy, Method, PassEstimate
from pipeline.generate.randomness import Floats, round_to_grid
from pipeline.generate.teacher import CountedTeacher
from pipeline.spec.generate_spec import GenerateSpec
from pipeline.structure import Sample, Structure


class Dynamics(Method):
    """Langevin dynamics from every sample; each attempt is a trajectory of its own.

    A trajectory has one structure a pass, so it is the slowest method.
    """

    letter = "d"

    def propose(self, copies: Sequence[Copy], attempt: int) -> list[Structure]:
        """Return the frames of the trajectories that ``copies`` belong to."""
        frames: dict[int, list[Structure]] = {}
        for parent in dict.fromkeys(copy.parent for copy in copies):
            last = max(c.number for c in copies if c.parent == parent)
            frames[parent] = self._run(parent, last + 1, attempt)
        return [frames[copy.parent][copy.number] for copy in copies]

    @classmethod
    def estimate_passes(cls, spec: GenerateSpec, n_atoms: int) -> PassEstimate:
        """Return the passes of all steps."""
        return PassEstimate(_steps(spec) + 2, 0)

    def _run(self, parent: int, count: int, attempt: int) -> list[Structure]:
        """Return the first ``count`` copies of a trajectory."""
        sample, spec = self.parents[parent], self.spec
        random = self.generator(Copy(parent, 0), attempt, "md")
        atoms = _as_atoms(sample, self.teacher)
        temperature = spec.setting("temperature")
        # Maxwell-Boltzmann: a variance of m kT for each component of a momentum.
        widths = np.sqrt(atoms.get_masses() * units.kB * temperature)
        atoms.set_momenta(widths[:, None] * random.standard_normal((len(atoms), 3)))
        dynamics = Langevin(
            atoms,
            spec.setting("timestep") * units.fs,
            temperature_K=temperature,
            friction=spec.setting("friction") / units.fs,
            # Its fixed centre of mass does not sample the ensemble of few atoms.
            fixcm=False,
            rng=random,
        )
        every, start = spec.setting("every"), sample.structure.positions
        skipped = _steps(spec) - spec.copies * every
        frames = []
        for number in range(count):
            dynamics.run(every + (skipped if number == 0 else 0))
            shift = round_to_grid(atoms.positions - start)
            frames.append(replace(sample.structure, positions=start + shift))
        return frames


def _steps(spec: GenerateSpec) -> int:
    steps: int | None = spec.setting("steps")
    return spec.copies * int(spec.setting("every")) if steps is None else steps


class _TeacherCalculator(Calculator):
    """Energy and forces of the teacher for ASE."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, sample: Sample, teacher: CountedTeacher) -> None:
        super().__init__()
        self._sample = sample
        self._teacher = teacher

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Label the positions of ``atoms``."""
        super().calculate(atoms, list(properties), list(system_changes))
        assert self.atoms is not None
        positions: Floats = np.array(self.atoms.positions)
        if not np.isfinite(positions).all():
            raise DataError(
                f"Sample {self._sample.sample_id!r}: its dynamics diverged; lower "
                "generate.timestep or generate.temperature."
            )
        structure = replace(self._sample.structure, positions=positions)
        label = self._teacher.label_structure(self._sample.sample_id, structure)
        self.results: dict[str, Any] = {
            "energy": label.energy,
            "forces": label.forces.astype(np.float64),
        }


def _as_atoms(sample: Sample, teacher: CountedTeacher) -> Atoms:
    structure = sample.structure
    atoms = Atoms(
        numbers=structure.atomic_numbers,
        positions=structure.positions,
        cell=structure.cell,
        pbc=structure.pbc,
    )
    if structure.fixed.any():
        atoms.set_constraint(FixAtoms(mask=structure.fixed))
    atoms.calc = _TeacherCalculator(sample, teacher)
    return atoms
