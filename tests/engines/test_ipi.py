"""i-PI with a student: numbers of the driver, and runs of the command."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write

from kd_train.evaluation.potential import StudentPotential
from pipeline.errors import DataError, SpecError
from tests.engines.conftest import evaluate
from tests.frames import DEMO

pytest.importorskip("ipi")
from ipi.utils.units import unit_to_internal, unit_to_user

from kd_train.ipi import StudentDriver

TEACHER = DEMO / "painn_teacher.safetensors"
INPUT = """<simulation verbosity='quiet'>
  <output prefix='out'>
    <properties stride='5' filename='table'>
      [step, conserved{{electronvolt}}, potential{{electronvolt}}, volume]
    </properties>
  </output>
  <total_steps>{steps}</total_steps>
  <prng><seed>8</seed></prng>
  <ffdirect name='kd'>
    <pes>custom</pes>
    <pes_path>kd_pes.py</pes_path>
    <parameters>{{{parameters}}}</parameters>
  </ffdirect>
  <system>
    <initialize nbeads='{beads}'>
      <file mode='ase' units='angstrom'>{start}</file>
      <velocities mode='thermal' units='kelvin'>300</velocities>
    </initialize>
    <forces><force forcefield='kd'/></forces>
    <motion mode='dynamics'>{motion}</motion>
    <ensemble>
      <temperature units='kelvin'>300</temperature>
      <pressure units='megapascal'>0</pressure>
    </ensemble>
  </system>
</simulation>"""
NVE = "<dynamics mode='nve'><timestep units='femtosecond'>0.25</timestep></dynamics>"
NPT = """<dynamics mode='npt'>
  <timestep units='femtosecond'>0.25</timestep>
  <barostat mode='isotropic'>
    <tau units='femtosecond'>200</tau>
    <thermostat mode='langevin'><tau units='femtosecond'>100</tau></thermostat>
  </barostat>
  <thermostat mode='langevin'><tau units='femtosecond'>100</tau></thermostat>
</dynamics>"""


def run(
    folder: Path, atoms: Atoms, motion: str, model: Path, steps: int, beads: int = 1
) -> np.ndarray:
    """Run i-PI; rows of step, conserved energy, potential (eV) and volume."""
    write(folder / "start.extxyz", atoms)
    pes = folder / "kd_pes.py"
    pes.write_text(
        "from kd_train.ipi import StudentDriver\n\n"
        '__DRIVER_NAME__ = "kd"\n__DRIVER_CLASS__ = "StudentDriver"\n'
    )
    options = {"model": model, "template": "start.extxyz"}
    options |= {"device": "cpu", "forces": "gradient"}
    text = INPUT.format(
        parameters=", ".join(f"{k}: {v}" for k, v in options.items()),
        steps=steps,
        beads=beads,
        start=folder / "start.extxyz",
        motion=motion,
    )
    (folder / "input.xml").write_text(text)
    command = [sys.executable, str(Path(sys.executable).with_name("i-pi")), "input.xml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return np.loadtxt(folder / "out.table")


@pytest.mark.parametrize("name", ["box", "free"])
def test_energy_forces_and_virial(
    name: str,
    student: Path,
    potential: StudentPotential,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    atoms = request.getfixturevalue(name)
    periodic = bool(atoms.pbc.all())
    write(tmp_path / "start.xyz", atoms, format="xyz")  # a format without periodicity
    driver = StudentDriver(
        str(student),
        str(tmp_path / "start.xyz"),
        pbc=str(periodic),
        device="cpu",
        forces="gradient",
    )
    position = unit_to_internal("length", "angstrom", atoms.positions)
    cell = unit_to_internal("length", "angstrom", atoms.cell.array.T)
    energy, forces, virial, extras = driver(cell, position)
    wanted = evaluate(potential, atoms)
    assert unit_to_user("energy", "electronvolt", energy) == pytest.approx(
        wanted.energy, abs=1e-9
    )
    found = unit_to_user("force", "ev/ang", forces)
    np.testing.assert_allclose(found, wanted.forces, atol=1e-8)
    found = unit_to_user("energy", "electronvolt", virial)
    np.testing.assert_allclose(found, wanted.virial, rtol=1e-8, atol=1e-9)
    assert extras == ""


def test_dynamics_conserve_energy(warm_methanol: Atoms, tmp_path: Path) -> None:
    atoms = warm_methanol.copy()
    atoms.set_cell([25, 25, 25])
    table = run(tmp_path, atoms, NVE, TEACHER, steps=100)
    assert len(table) == 21
    np.testing.assert_allclose(table[:, 1], table[0, 1], atol=2e-3)
    assert np.ptp(table[:, 2]) > 0.02


def test_npt_with_two_beads_runs(box: Atoms, student: Path, tmp_path: Path) -> None:
    table = run(tmp_path, box, NPT, student, steps=20, beads=2)
    assert np.isfinite(table).all()
    assert np.ptp(table[:, 3]) > 1e-6 * table[0, 3]


def test_setups_without_an_answer_are_refused(
    free: Atoms, student: Path, tmp_path: Path
) -> None:
    options = {"device": "cpu", "forces": "gradient"}
    with pytest.raises(SpecError, match=r"absent.xyz cannot be read .*; name a file"):
        StudentDriver(student, tmp_path / "absent.xyz", **options)
    file = tmp_path / "start.xyz"
    write(file, free, format="xyz")
    with pytest.raises(SpecError, match="pbc is 'maybe'; choose true or false"):
        StudentDriver(student, file, pbc="maybe", **options)
    driver = StudentDriver(student, file, pbc="false", **options)
    with pytest.raises(DataError, match="i-PI has 4 atoms, but the template has 9"):
        driver(np.eye(3), np.zeros((4, 3)))
    write(file, Atoms("N2", [[0, 0, 0], [0, 0, 1]]), format="xyz")
    with pytest.raises(DataError, match="held no N"):
        StudentDriver(student, file, **options)
