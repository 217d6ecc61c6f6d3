"""Random numbers that depend on names alone, and the grid of displacements."""

import hashlib

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
# Displacements are multiples of this (Å), since the last bits of a logarithm or of a
# matrix product differ between machines.
_GRID = 2.0**-24


def make_generator(*names: object) -> np.random.RandomState:
    """Return the generator of ``names``; numpy never changes its streams.

    Copies keep their numbers if the order of samples, the number of workers or the
    number of copies changes.
    """
    text = " ".join(map(str, names))
    digest = hashlib.blake2b(text.encode(), digest_size=32).digest()
    return np.random.RandomState(np.frombuffer(digest, "<u4"))


def round_to_grid(values: Floats) -> Floats:
    """Return ``values`` (Å) rounded to the grid of displacements."""
    rounded: Floats = np.round(values / _GRID) * _GRID
    return rounded
