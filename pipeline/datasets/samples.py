"""From what a file says about one sample to a checked ``Sample``."""

import re
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError
from pipeline.structure import Sample, Structure

Kind = TypeVar("Kind", bound=np.generic)
MOLECULE_TAG = 2
LARGEST_ELEMENT = 118
_OC20_NUMBER = re.compile(r"(?:random|frame)(\d+)")


@dataclass(frozen=True)
class Fields:
    """What a source has of one sample, unchecked; None where it has nothing.

    The factors turn its numbers into eV, Å and eV/Å.
    """

    atomic_numbers: Any
    positions: Any
    cell: Any
    pbc: Any
    tags: Any = None
    fixed: Any = None
    energy: Any = None
    forces: Any = None
    energy_factor: float = 1.0
    length_factor: float = 1.0
    forces_factor: float = 1.0


def make_sample(sample_id: str, fields: Fields, where: str) -> Sample:
    """``fields`` as a sample; tags are 2 and nothing is fixed where a source is silent.

    Parameters
    ----------
    where
        File and sample, as they begin the sentence of an error.

    Raises
    ------
    DataError
        A shape, an element, a position, a cell or a label is impossible.
    """
    numbers = _numbers(fields.atomic_numbers, where)
    n = len(numbers)
    tags = np.full(n, MOLECULE_TAG) if fields.tags is None else fields.tags
    fixed = np.zeros(n) if fields.fixed is None else fields.fixed
    length = fields.length_factor
    structure = Structure(
        atomic_numbers=numbers,
        positions=_finite(fields.positions, (n, 3), "positions", where) * length,
        cell=_finite(fields.cell, (3, 3), "a cell", where) * length,
        pbc=_exact(fields.pbc, (3,), "pbc", where, np.bool_),
        tags=_exact(tags, (n,), "tags", where, np.int8),
        fixed=_exact(fixed, (n,), "fixed", where, np.bool_),
    )
    return Sample(
        sample_id, structure, _energy(fields, where), _forces(fields, n, where)
    )


def pair_id(sid: Any, fid: Any) -> str | None:
    """Id ``{sid}_{fid}``, or ``{sid}``, or None without a sid.

    OC20 writes the same system as 17 or ``random17`` and the same frame as 3 or
    ``frame3``; the id has the numbers.
    """
    if sid is None:
        return None
    parts = [str(sid)] if fid is None else [str(sid), str(fid)]
    found = [_OC20_NUMBER.fullmatch(part) for part in parts]
    return "_".join(
        match.group(1) if match else part
        for part, match in zip(parts, found, strict=True)
    )


def id_text(value: Any, name: str, where: str) -> str:
    """Return a part of an id as text; 3.0 is 3, since files may have it as a float.

    Raises
    ------
    DataError
        It is neither a whole number nor text that can be written as UTF-8.
    """
    if isinstance(value, np.ndarray | np.generic) and value.size == 1:
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) not in (int, str):
        raise DataError(
            f"{where} has the {name} {value!s:.40}, which is neither text nor a "
            "whole number."
        )
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where} has the {name} {text!a:.40}, which is no valid text."
        ) from None
    return text


def _energy(fields: Fields, where: str) -> float:
    """The energy in eV; NaN, as some files write it, where there is none."""
    if fields.energy is None:
        return float("nan")
    _refuse_flags(fields.energy, "an energy", where)
    energy = float(_array(fields.energy, (), "an energy", where))
    if np.isinf(energy):
        raise DataError(f"{where} has an energy that is not finite.")
    return energy * fields.energy_factor


def _forces(fields: Fields, n: int, where: str) -> npt.NDArray[np.float32]:
    """Forces in eV/Å, (n, 3); all NaN where there are none."""
    if fields.forces is None:
        return np.full((n, 3), np.nan, np.float32)
    _refuse_flags(fields.forces, "forces", where)
    forces = _array(fields.forces, (n, 3), "forces", where) * fields.forces_factor
    with np.errstate(over="ignore"):
        single = forces.astype(np.float32)
    if not np.isfinite(single).all() and not np.isnan(single).all():
        raise DataError(f"{where} has forces with numbers that are not finite.")
    return single


def _refuse_flags(value: Any, what: str, where: str) -> None:
    if np.asarray(value).dtype.kind == "b":
        raise DataError(f"{where} has {what} with values that are no numbers.")


def _numbers(value: Any, where: str) -> npt.NDArray[np.uint8]:
    numbers = _array(value, None, "atomic numbers", where)
    if numbers.ndim != 1 or len(numbers) == 0:
        raise DataError(f"{where} has no atoms.")
    wrong = (numbers < 1) | (numbers > LARGEST_ELEMENT) | (numbers % 1 != 0)
    # NaN is neither too small nor too large.
    wrong |= ~np.isfinite(numbers)
    if wrong.any():
        raise DataError(f"{where} has the atomic number {numbers[wrong][0]:g}.")
    return numbers.astype(np.uint8)


def _finite(
    value: Any, shape: tuple[int, ...], what: str, where: str
) -> npt.NDArray[np.float64]:
    array = _array(value, shape, what, where)
    if not np.isfinite(array).all():
        raise DataError(f"{where} has {what} with numbers that are not finite.")
    return array


def _exact(
    value: Any, shape: tuple[int, ...], what: str, where: str, dtype: type[Kind]
) -> npt.NDArray[Kind]:
    """An array of ``dtype``; raises where a number is none of its values."""
    array = _finite(value, shape, what, where)
    with np.errstate(invalid="ignore"):
        cast = array.astype(dtype)
    wrong = cast != array
    if wrong.any():
        raise DataError(f"{where} has {what} with the value {array[wrong][0]:g}.")
    return cast


def _array(
    value: Any, shape: tuple[int, ...] | None, what: str, where: str
) -> npt.NDArray[np.float64]:
    """A copy in double precision; axes of length one may be missing or too many."""
    try:
        found = np.asarray(value)
        if found.dtype.kind == "O":
            found = np.asarray(found.tolist())
        # Text that looks like a number may have a unit in the next sample.
        if found.dtype.kind not in "biuf" and found.size:
            raise ValueError
        array = np.array(found, np.float64, order="C")
    except (TypeError, ValueError):
        shown = f" ({value!r:.60})" if isinstance(value, str) else ""
        raise DataError(
            f"{where} has {what} with values that are no numbers{shown}."
        ) from None
    if shape is None:
        return array
    if np.squeeze(array).shape != tuple(size for size in shape if size != 1):
        expected = f"expected {shape}" if shape else "expected one number"
        raise DataError(f"{where} has {what} of shape {array.shape}, {expected}.")
    return array.reshape(shape)
