"""Real structures that may lie beside the repository; tests skip where they do not."""

import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.datasets import open_dataset
from pipeline.structure import Sample, Structure

_BESIDE = Path(__file__).parents[3] / "shared" / "data"
DATA = Path(os.environ.get("KD_SHARED_DATA", _BESIDE))


def shared_file(name: str) -> Path:
    """The file or folder ``name`` of the shared data, or a skipped test."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"the shared data lack {name}; set KD_SHARED_DATA")
    return path


def real_samples(oc20: int = 1, acac: int = 1) -> list[Sample]:
    """Frames of a metal slab with an adsorbate (33 atoms) and of acetylacetone."""
    slab = shared_file("oc20_s2ef_debug/random1000100.extxyz.xz")
    molecule = shared_file("acac/train_600K.xyz.gz")
    found = []
    for path, count in ((slab, oc20), (molecule, acac)):
        dataset = open_dataset("extxyz", str(path), every=40, limit=count)
        found += [dataset[number] for number in range(count)]
    return found


def made_samples() -> list[Sample]:
    """A bent molecule, a chiral one, and a skewed crystal of few atoms; H, C and O."""
    rng = np.random.default_rng(3)
    water = np.array([[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    chiral = np.array(
        [[0, 0, 0], [1.1, 0, 0], [0, 1.4, 0], [0.1, -0.3, 1.2], [-0.8, -0.7, -0.6]]
    )
    cell = np.array([[4.1, 0, 0], [0.7, 3.9, 0], [0.3, -0.4, 4.4]])
    crystal = rng.uniform(size=(4, 3)) @ cell
    crystal[1:] += 0.5
    return [
        _sample("water", [8, 1, 1], water, None),
        _sample("chiral", [6, 1, 6, 8, 1], chiral, None),
        _sample("crystal", [8, 6, 1, 6], crystal, cell),
    ]


def _sample(
    name: str, numbers: list[int], positions: np.ndarray, cell: np.ndarray | None
) -> Sample:
    count = len(numbers)
    structure = Structure(
        np.array(numbers, np.uint8),
        positions.astype(np.float64),
        np.zeros((3, 3)) if cell is None else cell,
        np.full(3, cell is not None),
        np.full(count, 2, np.int8),
        np.zeros(count, bool),
    )
    return Sample(name, structure, np.nan, np.full((count, 3), np.nan, np.float32))
