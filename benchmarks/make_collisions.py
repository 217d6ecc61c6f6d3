"""Makes the demo's data set: small H/C/O molecules shot at each other, GFN2-xTB labels.

Needs tblite (``pip install kd-train[label]``); nothing else in the project calls this.
"""

import lzma
import multiprocessing
import os

# tblite reads this when it is imported; two threads are far slower at these sizes.
os.environ["OMP_NUM_THREADS"] = "1"

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click
import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.calculator import CalculationFailed
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from tblite.ase import TBLite

# fmt: off
MOLECULES = (
    "H2", "H2O", "H2O2", "CO", "CO2", "CH4", "C2H2", "C2H4", "C2H6", "H2CO", "CH3OH",
    "HCOOH", "CH3CHO", "CH3CH2OH", "CH3OCH3", "H2CCO", "OCHCHO", "HCOOCH3", "CH3COOH",
    "CH2OCH2", "C3H4_C3v", "C3H4_D2d", "C3H6_Cs", "C3H6_D3h", "C3H8", "CH3COCH3",
)
# fmt: on
SPLITS = ("train",) * 9 + ("val", "test")  # by trajectory number, in turn

TIMESTEP = 0.5  # fs
STEPS = 300
KEEP_EVERY = 12  # steps
COLLISION_ENERGY = (0.3, 8.0)  # eV, of the relative motion
IMPACT_PARAMETER = 1.5  # Å, at most
TEMPERATURE = (200.0, 800.0)  # K, inside each molecule
GAP = (2.5, 3.5)  # Å between the nearest atoms at the start
MAX_FORCE = 60.0  # eV/Å, any component
MAX_ENERGY = 20.0  # eV above the two relaxed molecules
MAX_DRIFT = 1.0  # eV of total energy: beyond it the run no longer conserves it
MAX_SCF_GAP = 0.05  # eV between the label and the energy the run followed
LABEL_ACCURACY = 0.1  # tblite's setting; a tenth of its default thresholds


@dataclass(frozen=True)
class Collision:
    """Two molecules about to meet, moving; and their energy far apart, at rest (eV)."""

    atoms: Atoms
    separated_energy: float


@dataclass(frozen=True)
class Trajectory:
    """Text of the samples kept from one collision, and why the others were not."""

    text: str
    kept: int
    dropped: Counter[str]


def calculator(accuracy: float = 1.0) -> TBLite:
    """GFN2-xTB without any memory of earlier structures."""
    return TBLite(method="GFN2-xTB", accuracy=accuracy, verbosity=0)


@cache
def relaxed(name: str) -> tuple[Atoms, float]:
    """One molecule at its GFN2-xTB minimum (0.02 eV/Å) and its energy in eV."""
    start = molecule(name)
    atoms = Atoms(start.numbers, start.positions, calculator=calculator())
    BFGS(atoms, logfile=None).run(fmax=0.02, steps=200)
    energy = float(atoms.get_potential_energy())
    atoms.calc = None
    return atoms, energy


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """Rotation matrix ``(3, 3)`` drawn evenly over all orientations."""
    w, x, y, z = (q := rng.normal(size=4)) / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def thermal_molecule(name: str, rng: np.random.Generator) -> tuple[Atoms, float]:
    """Molecule turned at random, at rest as a whole, vibrating and rotating inside."""
    minimum, energy = relaxed(name)
    atoms = minimum.copy()
    centred = atoms.positions - atoms.get_center_of_mass()
    atoms.positions = centred @ random_rotation(rng).T
    # At the minimum all thermal energy is kinetic and half of it turns into potential
    # energy, hence twice the temperature.
    spread = np.sqrt(2 * units.kB * rng.uniform(*TEMPERATURE) / atoms.get_masses())
    velocities = rng.normal(size=(len(atoms), 3)) * spread[:, None]
    masses = atoms.get_masses()[:, None]
    atoms.set_velocities(velocities - (masses * velocities).sum(0) / masses.sum())
    return atoms, energy


def draw_collision(rng: np.random.Generator) -> Collision:
    """Random pair on a collision course along z, centre of mass at rest."""
    first, energy_first = thermal_molecule(str(rng.choice(MOLECULES)), rng)
    second, energy_second = thermal_molecule(str(rng.choice(MOLECULES)), rng)
    gap = rng.uniform(*GAP)
    # The square root spreads the hits evenly over the disc.
    second.positions[:, 0] += IMPACT_PARAMETER * np.sqrt(rng.uniform())
    between = second.positions[None] - first.positions[:, None]
    sideways = np.hypot(between[..., 0], between[..., 1])
    ahead = np.sqrt(np.clip(gap**2 - sideways**2, 0.0, None)) - between[..., 2]
    # Pairs that pass each other sideways set no distance along z.
    second.positions[:, 2] += ahead[sideways < gap].max(initial=0.0)

    mass_first, mass_second = sum(first.get_masses()), sum(second.get_masses())
    total = mass_first + mass_second
    reduced = mass_first * mass_second / total
    speed = np.sqrt(2 * rng.uniform(*COLLISION_ENERGY) / reduced)
    along_z = np.array([0.0, 0.0, speed])
    first.set_velocities(first.get_velocities() + along_z * mass_second / total)
    second.set_velocities(second.get_velocities() - along_z * mass_first / total)
    return Collision(first + second, energy_first + energy_second)


def rounded(values: np.ndarray, digits: int) -> np.ndarray:
    """Values rounded, with -0 turned into 0."""
    return np.round(values, digits) + 0.0


def label(atoms: Atoms) -> tuple[np.ndarray, float, np.ndarray]:
    """Positions as stored (Å), and energy (eV) and forces (eV/Å) of exactly these."""
    centred = atoms.positions - atoms.get_center_of_mass()
    positions = rounded(centred, 6)
    stored = Atoms(atoms.numbers, positions, calculator=calculator(LABEL_ACCURACY))
    return positions, stored.get_potential_energy(), stored.get_forces()


def refusal(above: float, followed: float, forces: np.ndarray) -> str | None:
    """Why a labelled structure is not kept; None if it is.

    ``above`` and ``followed`` are the label and the run's energy in eV, both counted
    from the two separated molecules.
    """
    if not (np.isfinite(above) and np.isfinite(forces).all()):
        return "not finite"
    if np.abs(forces).max() > MAX_FORCE:
        return "force too large"
    if above > MAX_ENERGY:
        return "energy too high"
    if abs(above - followed) > MAX_SCF_GAP:
        return "two SCF solutions"
    return None


def as_text(
    sample_id: str,
    symbols: Sequence[str],
    positions: np.ndarray,
    energy: float,
    forces: np.ndarray,
) -> str:
    """One extended-XYZ frame without a lattice."""
    lines = [
        str(len(symbols)),
        f"Properties=species:S:1:pos:R:3:forces:R:3 energy={energy:.6f} "
        f'sample_id={sample_id} pbc="F F F"',
    ]
    for symbol, (x, y, z), (fx, fy, fz) in zip(
        symbols, positions, rounded(forces, 5), strict=True
    ):
        lines.append(f"{symbol} {x:.6f} {y:.6f} {z:.6f} {fx:.5f} {fy:.5f} {fz:.5f}")
    return "\n".join(lines) + "\n"


def run_trajectory(number: int, seed: np.random.SeedSequence) -> Trajectory:
    """Every kept sample of one collision; depends on nothing but its own seed."""
    collision = draw_collision(np.random.default_rng(seed))
    atoms, separated = collision.atoms, collision.separated_energy
    atoms.calc = calculator()
    frames: list[str] = []
    dropped: Counter[str] = Counter()
    planned = STEPS // KEEP_EVERY
    try:
        total = atoms.get_total_energy()
        dynamics = VelocityVerlet(atoms, timestep=TIMESTEP * units.fs)
        for step in range(KEEP_EVERY, STEPS + 1, KEEP_EVERY):
            dynamics.run(KEEP_EVERY)
            if abs(atoms.get_total_energy() - total) > MAX_DRIFT:
                dropped["energy not conserved"] += planned - step // KEEP_EVERY + 1
                break
            positions, energy, forces = label(atoms)
            followed = atoms.get_potential_energy() - separated
            if reason := refusal(energy - separated, followed, forces):
                dropped[reason] += 1
                continue
            sample_id = f"t{number:04d}_s{step:04d}"
            symbols = atoms.get_chemical_symbols()
            frames.append(as_text(sample_id, symbols, positions, energy, forces))
    except CalculationFailed:
        dropped["SCF failed"] += planned - len(frames) - dropped.total()
    return Trajectory("".join(frames), len(frames), dropped)


def compressed(text: str) -> bytes:
    """XZ stream of the text, the same bytes on every run."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0}]
    return lzma.compress(text.encode("ascii"), lzma.FORMAT_XZ, filters=filters)


@click.command()
@click.option("--seed", default=2026, show_default=True)
@click.option("--trajectories", default=220, show_default=True, type=click.IntRange(1))
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("cache_specs/demo"),
    show_default=True,
)
def main(seed: int, trajectories: int, workers: int, out: Path) -> None:
    """Write collisions_{train,val,test}.extxyz.xz into OUT."""
    seeds = np.random.SeedSequence(seed).spawn(trajectories)
    # Started afresh, workers inherit no half-initialised threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        results = list(pool.map(run_trajectory, range(trajectories), seeds))
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test"):
        members = [r for i, r in enumerate(results) if SPLITS[i % len(SPLITS)] == split]
        content = compressed("".join(r.text for r in members))
        (out / f"collisions_{split}.extxyz.xz").write_bytes(content)
        kept = sum(r.kept for r in members)
        click.echo(f"{split}: {kept} samples, {len(members)} trajectories")
    dropped = sum((r.dropped for r in results), Counter())
    click.echo(f"dropped: {dict(sorted(dropped.items()))}")


if __name__ == "__main__":
    main()
