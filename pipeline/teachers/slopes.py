"""Checks of derivatives of the energy: forces and virials, by central differences."""

import numpy as np

from pipeline.errors import ContractError
from pipeline.fields import TEACHER_VIRIAL
from pipeline.structure import Sample
from pipeline.teachers.subject import (
    ENERGY_SCALE,
    FORCE_SCALE,
    Floats,
    Subject,
    turn_and_move,
)

# Atoms move by at most this in finite differences (Å), whose error is larger. Cells
# stretch by the same share.
_STEP = 1e-3
_SLOPE_TOLERANCE = 0.02


def check_gradient_forces(subject: Subject) -> float:
    """Forces are the slope of the energy, by central differences along them."""
    worst = 0.0
    for sample in subject.samples:
        forces = subject.outputs([sample])["teacher_forces"]
        direction = forces / max(float(np.abs(forces).max()), 1e-12)
        ahead, behind = (
            turn_and_move(sample, np.eye(3), sign * _STEP * direction)
            for sign in (1, -1)
        )
        energies = subject.outputs([ahead, behind])["teacher_energy"]
        slope = float(energies[0] - energies[1]) / (2 * _STEP)
        wanted = -float((forces * direction).sum())
        scale = max(abs(wanted), FORCE_SCALE * len(forces))
        deviation = abs(slope - wanted) / scale
        if not deviation <= _SLOPE_TOLERANCE:
            raise ContractError(
                f"Along its forces the energy of sample {sample.sample_id!r} changes "
                f"by {slope:.4g} eV/Å, not by {wanted:.4g} as forces say."
            )
        worst = max(worst, deviation)
    return worst


def check_virial(subject: Subject) -> float:
    """Virials are symmetric, and minus the slope of the energy along strains.

    By central differences along the virial and along a random strain; slopes only of
    potentials whose forces are the gradient of the energy.
    """
    worst = 0.0
    for number, sample in enumerate(subject.samples):
        (virial,) = subject.outputs([sample])[TEACHER_VIRIAL]
        if np.abs(virial - virial.T).max() > subject.tolerance * np.abs(virial).max():
            raise ContractError(
                f"The virial of sample {sample.sample_id!r} is not symmetric."
            )
        if not subject.potential.guarantees.gradient_forces:
            continue
        drawn = np.random.default_rng(number).normal(size=(3, 3))
        for direction in (virial, drawn + drawn.T):
            strain = direction / max(float(np.abs(direction).max()), 1e-12)
            worst = max(worst, _compare_slope(subject, sample, virial, strain))
    return worst


def _compare_slope(
    subject: Subject, sample: Sample, virial: Floats, strain: Floats
) -> float:
    ahead, behind = (
        turn_and_move(sample, np.eye(3) + sign * _STEP * strain, np.zeros(3))
        for sign in (1, -1)
    )
    energies = subject.outputs([ahead, behind])["teacher_energy"]
    slope = float(energies[0] - energies[1]) / (2 * _STEP)
    wanted = -float((virial * strain).sum())
    scale = max(abs(wanted), ENERGY_SCALE * len(sample.structure))
    deviation = abs(slope - wanted) / scale
    if not deviation <= _SLOPE_TOLERANCE:
        raise ContractError(
            f"Along a strain the energy of sample {sample.sample_id!r} changes by "
            f"{slope:.4g} eV, not by {wanted:.4g} as its virial says."
        )
    return deviation
