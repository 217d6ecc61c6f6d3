"""All measurements of one potential: checks at the start, then its replicas."""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator

from kd_train.dynamics.checks import cell_errors, order_error, work_error
from kd_train.dynamics.rdf import Distribution, radial_distribution
from kd_train.dynamics.replicas import Replica, run_replica
from kd_train.dynamics.spec import DynamicsSpec
from kd_train.dynamics.structures import to_structure
from pipeline.files.atomic import write_atomically
from pipeline.structure import Structure

_SECONDS_OF_A_DAY = 86_400
_FS_OF_A_NS = 1e6


@dataclass(frozen=True)
class Potential:
    """A potential to measure: ``name`` is ``student`` or ``teacher``.

    ``exact`` has double precision, for the checks; ``running`` runs the dynamics.
    """

    name: str
    exact: Calculator
    running: Calculator


@dataclass(frozen=True)
class Measured:
    """Measurements of one potential; energies of checks in meV."""

    name: str
    atoms: Atoms
    timestep: float
    work_error: float
    order_error: float
    cell_errors: dict[str, float]
    replicas: tuple[Replica, ...]
    rdf: Distribution | None

    @property
    def failed(self) -> tuple[Replica, ...]:
        """Replicas that failed."""
        return tuple(r for r in self.replicas if r.reason is not None)

    @property
    def earliest_failure(self) -> float | None:
        """Time of the first failure in ps, of all replicas; None without a failure."""
        times = [r.failed_after for r in self.replicas if r.failed_after is not None]
        return min(times, default=None)

    @property
    def ms_per_step(self) -> float | None:
        """Mean time of a step in ms; None if no replica took two steps."""
        steps = sum(r.timed_steps for r in self.replicas)
        return 1000 * sum(r.seconds for r in self.replicas) / steps if steps else None

    @property
    def ns_per_day(self) -> float | None:
        """Simulated time of a day in ns."""
        ms = self.ms_per_step
        if not ms:
            return None
        return self.timestep / _FS_OF_A_NS * _SECONDS_OF_A_DAY / (ms / 1000)

    def metrics(self, nve: bool) -> dict[str, float | None]:
        """Return the metrics of `kd_train.dynamics.spec.METRICS` without the RDF's.

        None if a metric could not be measured. Metrics of replicas are the largest of
        all.
        """
        n = len(self.atoms)
        found: dict[str, float | None] = {"drift": None, "energy_range": None}
        if nve:
            found["drift"] = _largest(_size(r.drift(n)) for r in self.replicas)
            found["energy_range"] = _largest(r.energy_range(n) for r in self.replicas)
        stepped = [r.step_error for r in self.replicas if len(r.time) > 1]
        return found | {
            "work_error": self.work_error,
            "step_error": _largest(1000 * e for e in stepped),
            "order_error": self.order_error,
            "cell_error": max(self.cell_errors.values()),
            "failed_replicas": float(len(self.failed)),
            "ms_per_step": self.ms_per_step,
        }


def measure(
    potential: Potential,
    start: Atoms,
    spec: DynamicsSpec,
    folder: Path,
    tick: Callable[[int], object],
) -> Measured:
    """Measure ``potential`` from ``start``; each replica is kept in ``folder``.

    ``tick`` is that of `run_replica`.
    """
    walk = spec.walk
    exact = potential.exact
    worked = work_error(start, exact, walk.steps, walk.displacement, spec.seed)
    ordered = order_error(start, exact, spec.seed)
    cells = cell_errors(start, exact, spec.seed)
    replicas = []
    for number in range(spec.replicas):
        found = run_replica(start, potential.running, spec, number, tick)
        keep_replica(found, start, folder / f"{potential.name}-{number}")
        replicas.append(found)
    frames = [f for replica in replicas for f in frames_of(replica, start)]
    # Replicas that fail in equilibration leave no frame.
    rdf = radial_distribution(frames, spec.rdf.r_max, spec.rdf.bins) if frames else None
    return Measured(
        potential.name,
        start,
        spec.timestep,
        worked,
        ordered,
        cells,
        tuple(replicas),
        rdf,
    )


def frames_of(replica: Replica, start: Atoms) -> list[Structure]:
    """Return the kept frames of a replica as structures."""
    structure = to_structure(start)
    return [replace(structure, positions=p) for p in replica.frames]


def keep_replica(replica: Replica, start: Atoms, stem: Path) -> None:
    """Write ``stem.npz`` with energies and ``stem.extxyz`` with frames."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        time=np.array(replica.time),
        potential=np.array(replica.potential),
        kinetic=np.array(replica.kinetic),
        failed_after=np.array(
            np.nan if replica.failed_after is None else replica.failed_after
        ),
        reason=np.array(replica.reason or ""),
    )
    write_atomically(stem.with_suffix(".npz"), buffer.getvalue())
    images = []
    for positions in replica.frames:
        image = start.copy()
        image.set_constraint()
        image.positions = positions
        images.append(image)
    text = io.StringIO()
    if images:
        ase.io.write(text, images, format="extxyz")
    write_atomically(stem.with_suffix(".extxyz"), text.getvalue().encode())


def describe_replica(replica: Replica, n_atoms: int, nve: bool) -> dict[str, Any]:
    """Return a replica as plain data for ``dynamics.json``."""
    return {
        "replica": replica.number,
        "picoseconds": replica.time[-1] if replica.time else 0.0,
        "drift": replica.drift(n_atoms) if nve else None,
        "energy_range": replica.energy_range(n_atoms) if nve else None,
        "step_error": 1000 * replica.step_error,
        "failed_after": replica.failed_after,
        "reason": replica.reason,
    }


def _size(value: float | None) -> float | None:
    return None if value is None else abs(value)


def _largest(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None
