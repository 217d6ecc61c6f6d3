"""Error of a stored teacher against the reference labels, split by split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.fields import FIELDS
from pipeline.store.layout import IntArray

# This number of samples give a mean to a few percent, and are read in a moment.
MEASURED_SAMPLES = 2000
# Force errors of two splits that differ by more than this factor are worth a warning.
LARGEST_RATIO = 2.0
_READ = ("energy", "forces", "fixed", "teacher_energy", "teacher_forces")


class Samples(Protocol):
    """Samples by position, of which arrays can be read."""

    def __len__(self) -> int: ...

    def read(
        self, positions: npt.ArrayLike, paths: Sequence[str]
    ) -> dict[str, npt.NDArray[Any]]:
        """Read rows of the samples at ``positions``, in that order."""


@dataclass(frozen=True)
class TeacherError:
    """Mean absolute errors of ``samples`` samples in meV and meV/Å, NaN without labels.

    Forces are those of free atoms.
    """

    samples: int
    energy_mae: float
    forces_mae: float

    def to_dict(self) -> dict[str, float | None]:
        """Return a form that JSON can hold, with None in place of NaN."""
        return {
            key: value if isfinite(value) else None for key, value in vars(self).items()
        }


def measure_teacher(split: Samples) -> TeacherError | None:
    """Compare the stored teacher with the labels of at most ``MEASURED_SAMPLES``.

    The split must have a teacher. Returns None if no sample has a label.
    """
    positions = spread_labelled(split)
    paths = [FIELDS[name].path for name in _READ]
    found = split.read(positions, paths)
    energy, forces, fixed, own_energy, own_forces = (found[path] for path in paths)
    energies = np.abs(own_energy - energy)[np.isfinite(energy)]
    free = (fixed == 0) & np.isfinite(forces).all(axis=1)
    errors = np.abs(own_forces[free].astype(np.float64) - forces[free])
    if not len(energies) and not len(errors):
        return None
    return TeacherError(len(positions), _milli_mean(energies), _milli_mean(errors))


def spread_labelled(split: Samples, limit: int = MEASURED_SAMPLES) -> IntArray:
    """Choose at most ``limit`` positions with a reference energy, evenly spread.

    If no sample has an energy, the positions are of all samples.
    """
    path = FIELDS["energy"].path
    labelled = np.isfinite(split.read(np.arange(len(split)), [path])[path])
    positions = np.flatnonzero(labelled if labelled.any() else np.ones_like(labelled))
    count = min(limit, len(positions))
    return positions[np.arange(count) * len(positions) // max(count, 1)]


def unlike_errors(train: tuple[str, float], test: tuple[str, float]) -> str | None:
    """Return a warning if the force errors of two splits differ too much.

    ``train`` and ``test`` are the name of a split and its force error in meV/Å.
    """
    (first, low), (second, high) = train, test
    if not isfinite(low) or not isfinite(high):
        return None
    if high > LARGEST_RATIO * low:
        effect = "Distilling on frames that a teacher has memorised says little"
    elif low > LARGEST_RATIO * high:
        effect = "The structures of the two splits differ in kind"
    else:
        return None
    return (
        f"The teacher's force error is {low:.3g} meV/Å on {first} and {high:.3g} on "
        f"{second}. {effect}."
    )


def warn_of_unlike(errors: Mapping[str, TeacherError]) -> str | None:
    """Return a warning of the split whose force error is farthest from training's.

    Training is the split ``train``, or the first one if no split has this name.
    """
    if not errors:
        return None
    train = "train" if "train" in errors else next(iter(errors))
    low = errors[train].forces_mae
    others = {k: e.forces_mae for k, e in errors.items() if isfinite(e.forces_mae)}
    worst = max(others, key=lambda name: _ratio(low, others[name]), default=train)
    return unlike_errors((train, low), (worst, others.get(worst, nan)))


def _ratio(first: float, second: float) -> float:
    """Return the factor by which two errors differ, at least 1."""
    low, high = sorted((first, second))
    return high / low if low else (inf if high else 1.0)


def _milli_mean(values: npt.NDArray[np.float64]) -> float:
    return 1e3 * float(values.mean()) if len(values) else nan
