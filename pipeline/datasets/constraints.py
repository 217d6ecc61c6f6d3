"""Constraints of ASE as the one kind that samples have: atoms held on all axes."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

log = logging.getLogger("pipeline.datasets")
# Names of values that hold atoms in ways of their own.
_CONSTRAINT_LIKE = re.compile(
    r"(is_?)?(fix(ed)?|fix(ed)?_?(atoms?|mask|flags?)|froze?n?|freeze|constraints?"
    r"|constrained|selective_?dynamics|move|mov(e?able|ing)|mobile|free_?atoms?)",
    re.I,
)
# Masks of these may hold an atom together; their axes differ.
_MASKED = ("FixCartesian", "FixScaled")


def is_constraint_like(name: str) -> bool:
    """Whether a column or an array is named as if it held atoms."""
    return _CONSTRAINT_LIKE.fullmatch(name) is not None


def find_held_atoms(
    constraints: Iterable[Mapping[str, Any]], n_atoms: int
) -> tuple[npt.NDArray[np.bool_], tuple[str, ...]]:
    """Atoms held on all axes, and names of constraints that hold more than these.

    Parameters
    ----------
    constraints
        The dictionaries that ASE writes, with ``name`` and ``kwargs``.

    Returns
    -------
    fixed : array of bool
        (n_atoms,).
    lost : tuple of str
        Sorted names of constraints that ``fixed`` does not express.

    Raises
    ------
    KeyError, IndexError, TypeError, ValueError
        A dictionary is not one of ASE's.
    """
    fixed = np.zeros(n_atoms, np.bool_)
    axes = {name: np.zeros((n_atoms, 3), np.bool_) for name in _MASKED}
    lost = set()
    for constraint in constraints:
        name, kwargs = str(constraint["name"]), constraint["kwargs"]
        if name == "FixAtoms":
            # Flags for all atoms, or numbers of some.
            chosen = np.asarray(kwargs["indices"])
            flags = chosen.dtype == np.bool_
            fixed[chosen if flags else chosen.astype(np.intp)] = True
        elif name in _MASKED:
            mask = np.asarray(kwargs["mask"], np.bool_)
            axes[name][np.atleast_1d(np.asarray(kwargs["a"], np.intp))] |= mask
        else:
            lost.add(name)
    for held in axes.values():
        fixed |= held.all(axis=1)
    lost |= {name for name in _MASKED if (axes[name].any(axis=1) & ~fixed).any()}
    return fixed, tuple(sorted(lost))


def warn_of_constraints(path: str, lost: Iterable[tuple[str, ...]]) -> None:
    """Log how many samples have constraints that are not kept, and their names.

    Parameters
    ----------
    lost
        Names for every sample of the data set at ``path``.
    """
    total = count = 0
    names: Counter[str] = Counter()
    for total, sample in enumerate(lost, 1):  # noqa: B007
        count += bool(sample)
        names.update(sample)
    if count:
        log.warning(
            "%s: %d of %d samples have constraints that are not kept: %s; a store "
            "only knows atoms held on all axes, as FixAtoms and the columns fixed and "
            "move_mask hold them",
            path,
            count,
            total,
            ", ".join(f"{name} ({number})" for name, number in sorted(names.items())),
        )
