"""Radial distribution functions of frames, periodic or not."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError
from pipeline.graphs.neighbors import find_pairs
from pipeline.structure import Structure

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Distribution:
    """A radial distribution over bins.

    ``r`` (K,) are the middles of the bins in Å. ``values`` (K,): g(r) if the frames are
    periodic in three directions. Otherwise there is no density, and they are the
    distribution of pair distances in 1/Å, whose integral is one.
    """

    r: Floats
    values: Floats
    is_g: bool

    def difference(self, other: "Distribution") -> float:
        """Return the mean absolute difference over the bins."""
        return float(np.abs(self.values - other.values).mean())


def radial_distribution(
    frames: Sequence[Structure], r_max: float, bins: int
) -> Distribution:
    """Return the distribution of all pairs up to ``r_max`` Å, the mean over frames.

    At least one frame is needed. Periodic images count, also of an atom itself,
    whatever the size of the cell.
    """
    edges = np.linspace(0.0, r_max, bins + 1)
    total = np.zeros(bins)
    is_g = all(bool(frame.pbc.all()) for frame in frames)
    for frame in frames:
        # Both directions of each pair.
        distances = find_pairs(frame, r_max).distance
        counts = np.histogram(distances, edges)[0].astype(np.float64)
        if is_g:
            density = len(frame) / abs(np.linalg.det(frame.cell))
            shells = 4 / 3 * np.pi * np.diff(edges**3)
            counts /= len(frame) * density * shells
        total += counts
    middles = (edges[:-1] + edges[1:]) / 2
    if is_g:
        return Distribution(middles, total / len(frames), True)
    norm = total.sum() * (r_max / bins)
    return Distribution(middles, total / norm if norm else total, False)


def check_comparable(frame: Structure, other: Structure, where: str) -> None:
    """Refuse a reference whose atoms are others than those of ``frame``.

    Raises
    ------
    DataError
        Composition or periodicity differ; ``where`` names the reference.
    """
    if bool(frame.pbc.all()) != bool(other.pbc.all()):
        raise DataError(
            f"{where} and the structure differ in periodicity, so their radial "
            "distributions cannot be compared."
        )
    if _composition(frame) != _composition(other):
        raise DataError(
            f"{where} has another composition than the structure, so their radial "
            "distributions cannot be compared."
        )


def _composition(frame: Structure) -> dict[int, float]:
    """Shares of the elements, by atomic number."""
    numbers, counts = np.unique(frame.atomic_numbers, return_counts=True)
    shares = counts / len(frame)
    return {int(z): float(s) for z, s in zip(numbers, shares, strict=True)}
