"""From the stress or virial of a file to the virial of a sample; signs and limits.

A virial is W = -V·σ in eV, with the stress σ positive in tension, as ASE has it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError
from pipeline.structure import NO_VIRIAL, Structure

Floats = npt.NDArray[np.float64]
# ASE's order of six components: xx yy zz yz xz xy.
_VOIGT = [[0, 5, 4], [5, 1, 3], [4, 3, 2]]
# Ten times the stress at which the hardest crystals break is below 10 eV/Å³.
LARGEST_STRESS = 10.0
# The same for structures without volume, in eV per atom.
LARGEST_VIRIAL = 500.0
# Parts of a virial that are not symmetric, and differences between the two labels of a
# sample, are rounding up to this share of its largest entry plus this much per atom.
_SHARE, _PER_ATOM = 0.01, 1e-3
_IGNORE = "or set virial_key: none to read neither stress nor virial"


@dataclass(frozen=True)
class StrainLabel:
    """One label of a file: its name, its value, and the factor to eV/Å³ or eV."""

    name: str
    value: Any
    factor: float


def has_components(value: Any) -> bool:
    """Whether ``value`` has the six or nine numbers of a symmetric tensor."""
    try:
        found = np.asarray(value)
        if found.dtype.kind == "O":
            found = np.asarray(found.tolist())
    except (TypeError, ValueError):
        return False
    return found.dtype.kind in "iuf" and found.size in (6, 9)


def sample_virial(
    structure: Structure,
    virial: StrainLabel | None,
    stress: StrainLabel | None,
    where: str,
) -> Floats:
    """Return the virial of a sample, (3, 3) in eV; NaN if no label has numbers.

    Parameters
    ----------
    where
        File and sample, as they begin the sentence of an error.

    Raises
    ------
    DataError
        A label has another shape, is not symmetric, is too large, or belongs to a
        structure without volume, or the two labels disagree.
    """
    limit = LARGEST_STRESS * _volume(structure) or LARGEST_VIRIAL * len(structure)
    found = None if virial is None else _read(virial, where)
    if virial is not None and found is not None:
        found = _symmetric(found, virial.name, len(structure), where)
        _refuse_large(found, limit, f"the virial {virial.name!r}", structure, where)
    other = None if stress is None else _read(stress, where)
    if stress is None or other is None:
        return NO_VIRIAL if found is None else found
    other = _of_stress(other, stress.name, structure, where)
    if other is None:
        return NO_VIRIAL if found is None else found
    _refuse_large(other, limit, f"the stress {stress.name!r}", structure, where)
    if virial is not None and found is not None:
        _refuse_unlike(found, other, (virial.name, stress.name), structure, where)
        return found
    return other


def _volume(structure: Structure) -> float:
    """Volume in Å³; 0 for molecules and cells of less than three vectors."""
    if not structure.pbc.any():
        return 0.0
    return float(abs(np.linalg.det(structure.cell)))


def _read(label: StrainLabel, where: str) -> Floats | None:
    """(3, 3) of six or nine numbers; None if all of them are NaN."""
    try:
        found = np.asarray(label.value)
        if found.dtype.kind == "O":
            found = np.asarray(found.tolist())
        if found.dtype.kind not in "iuf":
            raise ValueError
        numbers = np.ravel(found).astype(np.float64) * label.factor
    except (TypeError, ValueError):
        raise DataError(
            f"{where} has {label.name!r} with values that are no numbers; correct it, "
            f"{_IGNORE}."
        ) from None
    if numbers.size not in (6, 9):
        raise DataError(
            f"{where} has {label.name!r} of shape {found.shape}, expected 6 or 9 "
            f"numbers; correct it, {_IGNORE}."
        )
    if np.isnan(numbers).all():
        return None
    if not np.isfinite(numbers).all():
        raise DataError(
            f"{where} has {label.name!r} with numbers that are not finite; correct "
            f"it, {_IGNORE}."
        )
    return numbers[_VOIGT] if numbers.size == 6 else numbers.reshape(3, 3)


def _of_stress(
    stress: Floats, name: str, structure: Structure, where: str
) -> Floats | None:
    """Virial of a stress; None if a structure without volume has zeros, as ASE writes.

    A stress of a molecule could have been divided by anything.
    """
    volume = _volume(structure)
    if not volume:
        if not stress.any():
            return None
        raise DataError(
            f"{where} has {name!r}, but no periodic cell with a volume; write its "
            f"virial in eV, {_IGNORE}."
        )
    return _symmetric(-volume * stress, name, len(structure), where)


def _symmetric(virial: Floats, name: str, n_atoms: int, where: str) -> Floats:
    if np.abs(virial - virial.T).max() > _tolerance(virial, n_atoms):
        raise DataError(
            f"{where} has {name!r}, which is not symmetric; correct it, {_IGNORE}."
        )
    return (virial + virial.T) / 2


def _tolerance(virial: Floats, n_atoms: int) -> float:
    return _SHARE * float(np.abs(virial).max()) + _PER_ATOM * n_atoms


def _refuse_large(
    virial: Floats, limit: float, what: str, structure: Structure, where: str
) -> None:
    largest = float(np.abs(virial).max())
    if largest <= limit:
        return
    volume = _volume(structure)
    size = f"{largest / len(structure):.3g} eV per atom"
    if volume:
        size = f"{largest / volume:.3g} eV/Å³"
    raise DataError(
        f"{where}: {what} is {size}, more than any material has; name its unit "
        f"with units: {{stress: …}}, {_IGNORE}."
    )


def _refuse_unlike(
    virial: Floats,
    other: Floats,
    names: tuple[str, str],
    structure: Structure,
    where: str,
) -> None:
    """Raise DataError if the virial of a file is not minus volume times its stress."""
    tolerance = _tolerance(virial, len(structure)) + _tolerance(other, len(structure))
    if np.abs(virial - other).max() <= tolerance:
        return
    reason = "have different values"
    if np.abs(virial + other).max() <= tolerance:
        reason = "have the signs of different conventions"
    raise DataError(
        f"{where}: {names[0]!r} and {names[1]!r} {reason}, where virial = -volume · "
        "stress is expected; name the one that is meant with virial_key or stress_key."
    )
