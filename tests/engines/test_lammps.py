"""LAMMPS with a student: numbers, dynamics, and runs that must end."""

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.lammps import convert
from ase.data import atomic_masses, atomic_numbers

from kd_train.evaluation.potential import Evaluation, StudentPotential
from kd_train.lammps import attach
from pipeline.errors import DataError, SpecError
from tests.engines.conftest import evaluate, warm

lammps = pytest.importorskip("lammps")

# LAMMPS' factors between its units, and of pressure in `real` (atm).
EV = {"metal": 1.0, "real": 23.060549}
FEMTOSECOND = {"metal": 1e-3, "real": 1.0}
BAR = {"metal": 1.0, "real": 1.01325}
ELEMENTS = ["H", "C", "O"]


@pytest.fixture(scope="session", autouse=True)
def _mpi() -> None:
    """Load the MPI library of the wheel, which the loader does not find."""
    library = Path(sys.prefix, "lib", "libmpi.so.12")
    if library.exists():
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


@pytest.fixture
def make() -> Iterator[Any]:
    """``make(atoms, units="metal")``: a LAMMPS object with the atoms, no forces."""
    made: list[Any] = []

    def start(atoms: Atoms, style: str = "metal", **changes: str) -> Any:
        lmp = lammps.lammps(cmdargs=["-log", "none", "-screen", "none"])
        made.append(lmp)
        boundary = changes.get("boundary", "p p p" if atoms.pbc.all() else "f f f")
        fill(lmp, atoms, style, boundary)
        return lmp

    yield start
    for lmp in made:
        lmp.close()


def fill(lmp: Any, atoms: Atoms, style: str, boundary: str) -> None:
    cell = atoms.cell.array if atoms.pbc.any() else 40 * np.eye(3)
    (x, _, _), (xy, y, _), (xz, yz, z) = cell
    lmp.commands_list(
        [
            f"units {style}",
            f"boundary {boundary}",
            "atom_style atomic",
            "atom_modify map array sort 3 0.0",
            "box tilt large",
            f"region cell prism 0 {x} 0 {y} 0 {z} {xy} {xz} {yz}",
            "create_box 3 cell",
            *(
                f"mass {k} {atomic_masses[atomic_numbers[symbol]]:.12f}"
                for k, symbol in enumerate(ELEMENTS, 1)
            ),
            "comm_modify cutoff 3.0",
            "neighbor 1.0 bin",
        ]
    )
    types = [ELEMENTS.index(symbol) + 1 for symbol in atoms.symbols]
    n = lmp.create_atoms(
        len(atoms), None, types, atoms.positions.ravel().tolist(), None, None, False
    )
    assert n == len(atoms)
    if atoms.has("momenta"):
        velocities = convert(atoms.get_velocities(), "velocity", "ASE", style)
        lmp.scatter_atoms("v", 1, 3, np.ctypeslib.as_ctypes(velocities.ravel()))
    lmp.command(
        "thermo_style custom step pe ke etotal press pxx pyy pzz pxy pxz pyz vol"
    )
    lmp.command("thermo_modify format float %20.15g norm no")


def gather(lmp: Any, name: str) -> np.ndarray:
    return np.array(lmp.gather_atoms(name, 1, 3)).reshape(-1, 3)


def pressures(lmp: Any) -> np.ndarray:
    names = ("pxx", "pyy", "pzz", "pxy", "pxz", "pyz")
    return np.array([lmp.get_thermo(name) for name in names])


@pytest.mark.parametrize("style", ["metal", "real"])
@pytest.mark.parametrize("name", ["box", "free"])
def test_energy_forces_and_pressure(
    name: str,
    style: str,
    make: Any,
    potential: StudentPotential,
    request: pytest.FixtureRequest,
) -> None:
    atoms = request.getfixturevalue(name)
    lmp = make(atoms, style)
    attach(lmp, potential, ELEMENTS)
    lmp.command("run 0")
    wanted = evaluate(potential, atoms)
    energy = lmp.get_thermo("pe") / EV[style]
    assert energy == pytest.approx(wanted.energy, abs=1e-9)
    forces = gather(lmp, "f") / EV[style]
    np.testing.assert_allclose(forces, wanted.forces, atol=1e-8)
    assert np.abs(wanted.forces).max() > 0.1
    # eV/Å³ in bar, as LAMMPS has it in `metal`.
    volume = lmp.get_thermo("vol")
    bar = wanted.virial[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]] / volume * 1.6021765e6
    found = pressures(lmp) * BAR[style]
    relative = 1e-8 if style == "metal" else 1e-6  # LAMMPS rounds 68568.415
    np.testing.assert_allclose(
        found, bar, rtol=relative, atol=relative * abs(bar).max()
    )


@pytest.mark.parametrize("style", ["metal", "real"])
def test_the_drift_is_that_of_ase(
    style: str,
    warm_methanol: Atoms,
    drift: np.ndarray,
    make: Any,
    trained: StudentPotential,
) -> None:
    lmp = make(warm_methanol, style)
    attach(lmp, trained, ELEMENTS)
    lmp.command(f"timestep {0.25 * FEMTOSECOND[style]}")
    lmp.command("fix 1 all nve")
    lmp.command("run 0")
    found = [lmp.get_thermo("etotal")]
    for _ in range(10):
        lmp.command("run 20")
        found.append(lmp.get_thermo("etotal"))
    change = (np.array(found) - found[0]) / EV[style]
    # LAMMPS has constants of its own, of six to eight digits.
    np.testing.assert_allclose(change, drift[::20], atol=2e-6)


def test_triclinic_npt_and_minimisation_run(
    box: Atoms, make: Any, potential: StudentPotential
) -> None:
    warm(box)
    lmp = make(box)
    attach(lmp, potential, ELEMENTS)
    lmp.command("minimize 0 1e-4 20 100")
    minimum = lmp.get_thermo("pe")
    assert minimum < evaluate(potential, box).energy
    lmp.command("timestep 0.00025")
    lmp.command("fix 1 all npt temp 300 300 0.1 tri 0 0 1.0")
    lmp.command("thermo_style custom step pe etotal econserve vol press")
    lmp.command("run 0")
    start, volume = lmp.get_thermo("econserve"), lmp.get_thermo("vol")
    lmp.command("run 100")
    assert lmp.get_thermo("econserve") == pytest.approx(start, abs=0.02)
    assert lmp.get_thermo("vol") != pytest.approx(volume, rel=1e-6)
    low, high, xy, yz, xz, _, _ = lmp.extract_box()
    assert [xy, xz, yz] != pytest.approx([1.1, -0.7, 0.9], abs=1e-9)
    # The last step once more, from what LAMMPS holds.
    cell = np.diag(np.subtract(high, low))
    cell[1, 0], cell[2, 0], cell[2, 1] = xy, xz, yz
    last = Atoms(box.numbers, gather(lmp, "x") - low, cell=cell, pbc=True)
    assert lmp.get_thermo("pe") == pytest.approx(
        evaluate(potential, last).energy, abs=1e-8
    )


class Failing(StudentPotential):
    """A potential that fails at its fifth step."""

    error: BaseException
    calls = 0

    def evaluate(self, *args: Any) -> Evaluation:
        self.calls += 1
        if self.calls == 5:
            raise self.error
        return super().evaluate(*args)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, DataError, MemoryError])
def test_an_exception_ends_the_run_and_is_raised(
    kind: type[BaseException], free: Atoms, make: Any, student: Path
) -> None:
    failing = Failing(student, device="cpu", forces="gradient")
    failing.error = kind("of the fifth step")
    lmp = make(free)
    link = attach(lmp, failing, ELEMENTS)
    lmp.command("thermo 1")
    lmp.command("fix 1 all nve")
    with pytest.raises(kind, match="of the fifth step"):
        lmp.commands_list(["run 20", "run 30"])
    assert link.error is failing.error
    assert lmp.extract_global("ntimestep") == 4
    assert np.isnan(lmp.get_thermo("pe"))
    # What computes nothing still works, and no later run gives a wrong trajectory.
    lmp.command("reset_timestep 0")
    with pytest.raises(kind, match="of the fifth step"):
        lmp.command("run 1")
    with pytest.raises(kind, match="of the fifth step"):
        lmp.command("minimize 0 1e-4 20 100")
    assert failing.calls == 5


def test_lost_atoms_end_the_run(
    free: Atoms, make: Any, potential: StudentPotential
) -> None:
    lmp = make(free)
    attach(lmp, potential, ELEMENTS)
    lmp.command("thermo_modify lost ignore")
    lmp.command("fix 1 all nve")
    lmp.command("velocity all set 5000.0 0.0 0.0")
    with pytest.raises(DataError, match="LAMMPS lost . of 9 atoms; use a smaller time"):
        lmp.command("run 1000")


def test_setups_without_an_answer_are_refused(
    free: Atoms, make: Any, potential: StudentPotential, student: Path
) -> None:
    def refused(elements: Any, words: str, kind: type[Exception] = SpecError) -> None:
        with pytest.raises(kind, match=words):
            attach(lmp, potential, elements)
        assert not lmp.has_id("fix", "kd")

    lmp = make(free)
    refused(["H", "C"], "elements has 2 symbols, but LAMMPS has 3 atom types")
    refused("HCO", "must be a list of symbols")
    refused(["H", "C", "Ox"], "must be a list of symbols")
    refused(["H", "C", "N"], "list of elements holds N; the data", DataError)
    with pytest.raises(SpecError, match="takes no options"):
        attach(lmp, potential, ELEMENTS, dtype="float32")
    attach(lmp, student, ELEMENTS, device="cpu", forces="gradient", name="other")
    assert lmp.has_id("fix", "other")
    lmp = lammps.lammps(cmdargs=["-log", "none", "-screen", "none"])
    refused(ELEMENTS, "units lj; choose `units metal`")
    lmp.command("units metal")
    refused(ELEMENTS, "no box yet")
    lmp.close()


def test_several_ranks_are_refused(student: Path) -> None:
    mpirun = Path(sys.prefix, "bin", "mpirun")
    if not mpirun.exists():
        pytest.skip("there is no mpirun")
    code = (
        "import ctypes, sys; from pathlib import Path;"
        "ctypes.CDLL(str(Path(sys.prefix, 'lib/libmpi.so.12')), ctypes.RTLD_GLOBAL);"
        "from lammps import lammps; from kd_train.lammps import attach;"
        "lmp = lammps(cmdargs=['-log', 'none', '-screen', 'none']);"
        f"attach(lmp, {str(student)!r}, ['H'])"
    )
    command = [str(mpirun), "-n", "2", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "LAMMPS runs on 2 MPI ranks, but a student needs" in done.stderr


def test_units_are_ases(free: Atoms) -> None:
    """The factor of `real` is that of physics, as far as LAMMPS rounds it."""
    assert EV["real"] == pytest.approx(units.mol / units.kcal, rel=1e-7)
