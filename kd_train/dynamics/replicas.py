"""Replicas: one trajectory each, with its own seed, watched for failure."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.md.langevin import Langevin
from ase.md.verlet import VelocityVerlet

from kd_train.dynamics.checks import attach, largest, work
from kd_train.dynamics.failures import Watch
from kd_train.dynamics.spec import DynamicsSpec
from pipeline.errors import DataError

Floats = npt.NDArray[np.float64]
_MEV = 1000.0


@dataclass
class Replica:
    """A trajectory, ended early if it failed.

    ``potential`` and ``kinetic`` (T,) in eV at ``time`` (T,) in ps after equilibration,
    a value for each step and one for the start; ``frames`` (F, N, 3) in Å are those of
    every ``every``-th step. ``failed_after`` is in ps, equilibration included.
    ``step_error`` is the largest difference of energy and work of a step, in eV.
    ``seconds`` is the time of ``timed_steps``, without checks.
    """

    number: int
    time: list[float] = field(default_factory=list)
    potential: list[float] = field(default_factory=list)
    kinetic: list[float] = field(default_factory=list)
    frames: list[Floats] = field(default_factory=list)
    step_error: float = 0.0
    seconds: float = 0.0
    timed_steps: int = 0
    failed_after: float | None = None
    reason: str | None = None

    def total(self, n_atoms: int) -> Floats:
        """Return the total energy minus its start in meV per atom, (T,)."""
        energy = np.add(self.potential, self.kinetic)
        moved: Floats = (energy - energy[:1]) * _MEV / n_atoms
        return moved

    def drift(self, n_atoms: int) -> float | None:
        """Return the slope of the total energy in meV/atom/ps, by a linear fit.

        None if fewer than three steps are known.
        """
        if len(self.time) < 3:
            return None
        return float(np.polyfit(self.time, self.total(n_atoms), 1)[0])

    def energy_range(self, n_atoms: int) -> float | None:
        """Return the range of the total energy in meV/atom; None without a step."""
        return float(np.ptp(self.total(n_atoms))) if len(self.time) > 1 else None


def run_replica(
    start: Atoms,
    calculator: Calculator,
    spec: DynamicsSpec,
    number: int,
    tick: Callable[[int], object],
) -> Replica:
    """Run replica ``number`` from ``start``; the same number gives the same replica.

    ``tick`` is called after each step with the number of steps, and once with those
    that a failure leaves out.
    """
    runner = _Runner(start, calculator, spec, number)
    steps = spec.equilibration + spec.n_steps
    for step in range(steps):
        reason = runner.advance(step)
        tick(1)
        if reason is not None:
            runner.replica.failed_after = (step + 1) * spec.timestep / 1000
            runner.replica.reason = reason
            tick(steps - step - 1)
            break
    return runner.replica


class _Runner:
    """A replica in progress."""

    def __init__(
        self, start: Atoms, calculator: Calculator, spec: DynamicsSpec, number: int
    ) -> None:
        self.spec = spec
        self.replica = Replica(number)
        random = np.random.default_rng([spec.seed, 0, number])
        self.atoms = attach(start, calculator)
        draw_velocities(self.atoms, spec.temperature, random)
        self.watch = Watch(start, spec.failure, spec.temperature)
        self.warm_up = _langevin(self.atoms, spec, random)
        self.dynamics: Langevin | VelocityVerlet = self.warm_up
        if spec.ensemble == "nve":
            self.dynamics = VelocityVerlet(self.atoms, spec.timestep * units.fs)
        self._state = self._look()
        if spec.equilibration == 0:
            self._record(0)

    def advance(self, step: int) -> str | None:
        """Take a step and return why the replica has failed with it, or None."""
        done = step + 1 - self.spec.equilibration
        before = self._state
        try:
            # Numbers that overflow end the replica below.
            with np.errstate(over="ignore", invalid="ignore"):
                begin = time.perf_counter()
                (self.dynamics if done > 0 else self.warm_up).step()
                self._state = self._look()
                seconds = time.perf_counter() - begin
        except DataError as error:
            return f"the student refuses the atoms: {str(error).rstrip('.')}"
        # The first step of a process is slow: libraries are loaded, kernels are made.
        if step > 0:
            self.replica.seconds += seconds
            self.replica.timed_steps += 1
        fault = self._fault(done)
        if fault is None and done >= 0:
            self._record(done)
        if fault is None and done > 0:
            self.replica.step_error = self._step_error(before)
        return fault

    def _look(self) -> tuple[float, Floats, Floats]:
        """Potential energy in eV, forces and positions (N, 3)."""
        forces = np.array(self.atoms.get_forces(), np.float64)
        energy = float(self.atoms.get_potential_energy())
        return energy, forces, self.atoms.get_positions()

    def _fault(self, done: int) -> str | None:
        energy, forces, positions = self._state
        found = self.watch.energy_fault(
            [energy, float(forces.sum())], self.atoms.get_temperature()
        )
        if found is None and done % self.spec.every == 0:
            found = self.watch.position_fault(positions)
        return found

    def _record(self, done: int) -> None:
        self.replica.time.append(done * self.spec.timestep / 1000)
        self.replica.potential.append(self._state[0])
        self.replica.kinetic.append(float(self.atoms.get_kinetic_energy()))
        if done % self.spec.every == 0:
            self.replica.frames.append(self._state[2])

    def _step_error(self, before: tuple[float, Floats, Floats]) -> float:
        energy, forces, positions = self._state
        gained = work(before[2], positions, before[1], forces)
        return largest(self.replica.step_error, abs(energy - before[0] + gained))


def draw_velocities(
    atoms: Atoms, temperature: float, random: np.random.Generator
) -> None:
    """Draw velocities at exactly ``temperature`` (K).

    The centre of mass is at rest, unless atoms are fixed.
    """
    masses = atoms.get_masses()[:, None]
    # Maxwell-Boltzmann: a variance of m kT for each component of a momentum.
    momenta = np.sqrt(masses * units.kB * temperature)
    momenta = momenta * random.standard_normal((len(atoms), 3))
    if not atoms.constraints:
        momenta -= masses * momenta.sum(axis=0) / masses.sum()
    atoms.set_momenta(momenta)
    found = atoms.get_temperature()
    if found > 0:
        atoms.set_momenta(atoms.get_momenta() * np.sqrt(temperature / found))


def _langevin(atoms: Atoms, spec: DynamicsSpec, random: Any) -> Langevin:
    return Langevin(
        atoms,
        spec.timestep * units.fs,
        temperature_K=spec.temperature,
        friction=spec.friction / units.fs,
        # Its fixed centre of mass does not sample the ensemble of few atoms.
        fixcm=False,
        rng=random,
    )
