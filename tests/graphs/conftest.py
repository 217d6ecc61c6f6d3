from collections.abc import Callable

import numpy as np
import pytest

from pipeline.structure import Structure

MakeStructure = Callable[..., Structure]


@pytest.fixture
def make_structure() -> MakeStructure:
    """Structure of given positions; carbon atoms in open space unless told."""

    def make(positions, cell=None, pbc=(False, False, False), numbers=None):
        positions = np.asarray(positions, float).reshape(-1, 3)
        n = len(positions)
        return Structure(
            np.full(n, 6, np.uint8) if numbers is None else np.array(numbers, np.uint8),
            positions,
            np.zeros((3, 3)) if cell is None else np.asarray(cell, float),
            np.asarray(pbc, bool),
            np.full(n, 2, np.int8),
            np.zeros(n, bool),
        )

    return make


@pytest.fixture
def random_structure(make_structure):
    """Structure with a skewed cell, mixed periodicity and unwrapped positions."""

    def make(seed: int) -> Structure:
        rng = np.random.default_rng(seed)
        cell = np.diag(rng.uniform(2.0, 7.0, 3)) + rng.uniform(-1, 1, (3, 3))
        fractions = rng.uniform(-1.3, 2.2, (rng.integers(1, 7), 3))
        return make_structure(fractions @ cell, cell, rng.integers(0, 2, 3))

    return make
