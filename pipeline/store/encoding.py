"""Lossy profiles: features as small integers, and what those integers mean.

``x = (((q - zero) · row scale) · channel scale) @ rotation + mean``, where ``q8`` has
int8, a scale for every row and no zero; ``compact`` int16, one step for all and, where
that packs better, an orthogonal rotation of the channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Profile = Literal["q8", "compact"]

DTYPES: dict[str, str] = {"q8": "int8", "compact": "int16"}
TABLES = ("channel_scale", "mean", "rotation", "zero")
# Arrays beside an encoded one: scales of rows (q8), squared error and size by sample.
SCALE, ERROR = "_scale", "_error"
_MAX_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True, eq=False)
class Encoding:
    """Meaning of the integers of one array.

    ``channel_scale`` (C,) and ``mean`` (C,) float32; ``rotation`` (C, C) float32 is
    orthogonal; ``zero`` (C,) float32 is the integer that stands for the mean. Vectors
    (3, C) have no mean, so that an encoding of a rotated structure decodes to rotated
    vectors, up to the error.
    """

    profile: Profile
    channel_scale: Floats
    mean: Floats
    rotation: Floats | None = None
    zero: Floats | None = None

    @property
    def has_row_scales(self) -> bool:
        """Whether every row has a scale of its own."""
        return self.profile == "q8"

    @property
    def tables(self) -> dict[str, Floats]:
        """Parameters by name, those in use."""
        values = {name: getattr(self, name) for name in TABLES}
        return {name: value for name, value in values.items() if value is not None}

    def encode(
        self, values: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.float16] | None]:
        """Integers for ``values`` (M, ..., C), and scales (M,) of their rows for q8.

        Raises
        ------
        OverflowError
            A value is too far from the others for these integers.
        """
        scaled = values.astype(np.float32, copy=False) - self.mean
        if self.rotation is not None:
            scaled = scaled @ self.rotation.T
        scaled /= self.channel_scale
        if self.zero is not None:
            scaled += self.zero
        if self.profile == "compact":
            return _integers(scaled, np.dtype(np.int16)), None
        scale = _row_scale(scaled)
        # Rows of zeros have scale 0.
        divisor = np.where(scale > 0, scale, 1).astype(np.float32)
        scaled /= _broadcast(divisor, scaled)
        return _integers(scaled, np.dtype(np.int8)), scale

    def decode(
        self, integers: npt.NDArray[Any], scale: npt.NDArray[np.float16] | None
    ) -> Floats:
        """Values (M, ..., C) float32 behind integers and the scales of their rows."""
        rows = None if scale is None else _broadcast(scale.astype(np.float32), integers)
        return dequantized(integers.astype(np.float32), rows, self.tables)

    def error(
        self, values: npt.NDArray[Any], decoded: Floats
    ) -> npt.NDArray[np.float64]:
        """(M, 2) squared error of every row, and its squared distance to the mean."""
        exact = values.astype(np.float32, copy=False)
        sums = np.empty((len(values), 2))
        for column, difference in enumerate((decoded - exact, exact - self.mean)):
            rows = difference.reshape(len(values), -1)
            sums[:, column] = np.einsum("ij,ij->i", rows, rows)
        return sums


def dequantized(values: Any, row_scale: Any, tables: Mapping[str, Any]) -> Any:
    """Decoded features; numpy arrays or torch tensors of float32 alike.

    ``row_scale`` is None or broadcasts against ``values`` (M, ..., C).
    """
    if "zero" in tables:
        values = values - tables["zero"]
    scaled = values * tables["channel_scale"]
    if row_scale is not None:
        scaled = scaled * row_scale
    if "rotation" in tables:
        scaled = scaled @ tables["rotation"]
    return scaled + tables["mean"]


def relative_error(sums: npt.NDArray[np.float64]) -> float:
    """Squared error relative to the variance, from rows of `Encoding.error`."""
    wrong, size = sums.reshape(-1, 2).sum(axis=0).tolist()
    return wrong / size if size > 0 else 0.0


def _integers(values: Floats, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    limit = np.iinfo(dtype).max
    np.rint(values, out=values)
    largest = _largest(values)
    if largest > limit:
        raise OverflowError(f"{largest:.3g} steps from the mean, {limit} fit")
    return values.astype(dtype)


def _largest(values: Floats) -> float:
    return float(max(values.max(initial=0), -values.min(initial=0)))


def _row_scale(scaled: Floats) -> npt.NDArray[np.float16]:
    rows = scaled.reshape(len(scaled), -1)
    largest = (
        np.maximum(rows.max(axis=1, initial=0), -rows.min(axis=1, initial=0)) / 127
    )
    if largest.max(initial=0) > _MAX_HALF:
        raise OverflowError(f"a row scale of {largest.max():.3g}, {_MAX_HALF:g} fits")
    half = largest.astype(np.float16)
    # Rounded up, so that no value of the row exceeds 127 steps.
    return np.where(
        half.astype(np.float32) < largest, np.nextafter(half, np.float16(np.inf)), half
    )


def _broadcast(scale: Floats, values: npt.NDArray[Any]) -> Floats:
    return scale.reshape(-1, *[1] * (values.ndim - 1))
