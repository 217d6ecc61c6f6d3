"""Mean, covariance and principal directions of rows that are seen in pieces."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# A standard deviation below this share of a channel's size is rounding.
_CONSTANT = 1e-6
# An eigenvalue below this share of the largest is rounding.
_NULL = 1e-12


class Moments:
    """Number, mean (C,) and covariance (C, C) of all rows that were added.

    Every piece is centred on its own mean, so that large means cost no digits.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean: Floats = np.zeros(width)
        self._scatter: Floats = np.zeros((width, width))

    def add(self, rows: Floats) -> None:
        """Add ``rows`` (n, C)."""
        if not len(rows):
            return
        mean = rows.mean(axis=0)
        centred, shift = rows - mean, mean - self.mean
        total = self.count + len(rows)
        self._scatter += centred.T @ centred
        self._scatter += np.outer(shift, shift) * (self.count * len(rows) / total)
        self.mean = self.mean + shift * (len(rows) / total)
        self.count = total

    @property
    def covariance(self) -> Floats:
        """(C, C) mean of the products of deviations."""
        return self._scatter / max(self.count, 1)


@dataclass(frozen=True, eq=False)
class Projection:
    """Map of rows (n, C) to their parts (n, k) along principal directions.

    ``variances`` (k,) are those of the parts, in descending order.
    """

    mean: Floats
    matrix: Floats
    variances: Floats

    @classmethod
    def of(cls, moments: Moments, width: int) -> "Projection":
        """Return the projection on at most ``width`` directions, at least one."""
        return _principal(moments, np.ones(len(moments.mean)), width)

    @classmethod
    def standardised(cls, moments: Moments, width: int) -> "Projection":
        """Return the same for channels of equal variance, 1 in total.

        Constant channels count nothing.
        """
        variances = np.diagonal(moments.covariance).clip(min=0)
        sizes = np.sqrt(variances + np.square(moments.mean))
        varies = np.sqrt(variances) > _CONSTANT * sizes
        factors = np.zeros(len(variances))
        factors[varies] = 1 / np.sqrt(variances[varies] * varies.sum())
        return _principal(moments, factors, width)

    def apply(self, rows: Floats) -> Floats:
        """Return the parts (n, k) of ``rows`` (n, C)."""
        return (rows - self.mean) @ self.matrix


def _principal(moments: Moments, factors: Floats, width: int) -> Projection:
    """Return principal directions of channels that are multiplied by ``factors``."""
    scaled = moments.covariance * np.outer(factors, factors)
    values, vectors = np.linalg.eigh(scaled)
    values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
    kept = int((values > _NULL * values[0]).sum())
    kept = max(1, min(width, kept))
    matrix = factors[:, None] * vectors[:, :kept]
    return Projection(moments.mean, matrix, values[:kept])
