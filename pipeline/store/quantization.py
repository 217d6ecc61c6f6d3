"""Lossy profiles: features as small integers, and what those integers mean.

``x = (((q - zero) · row scale) · channel scale) @ rotation + mean``, where ``q8`` has
int8, a scale for every row and no zero; ``compact`` int16, one step for all and, where
that packs better, an orthogonal rotation of the channels.

Decoding gives equal bits on every processor, however rows are batched. Without a
rotation it is a few operations on single numbers. With one it is a matrix product whose
every sum is exact in float64, so that no order of its terms can change it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Profile = Literal["q8", "compact"]

DTYPES: dict[str, str] = {"q8": "int8", "compact": "int16"}
TABLES = ("channel_scale", "mean", "rotation", "zero")
# Names that stores have for fields of `Quantization`.
_FIELDS = {"zero": "zero_point"}
# Arrays beside an encoded one: scales of rows (q8), squared error and size by sample.
SCALE, ERROR = "_scale", "_error"
_MAX_HALF = float(np.finfo(np.float16).max)
# Rows decoded together: their float64 stays in the processor's cache.
PIECE_ROWS = 512
# Whole numbers up to 2 to this power, and sums of them, are exact in float64.
_EXACT_BITS = 53


@dataclass(frozen=True, eq=False)
class Quantization:
    """Meaning of the integers of one array.

    ``channel_scale`` (C,) and ``mean`` (C,) float32; ``rotation`` (C, C) float32 is
    orthogonal; ``zero_point`` (C,) float32 is the integer that stands for the mean.
    Vectors (3, C) have no mean, so that an encoding of a rotated structure decodes to
    rotated vectors, up to the error.
    """

    profile: Profile
    channel_scale: Floats
    mean: Floats
    rotation: Floats | None = None
    zero_point: Floats | None = None

    @classmethod
    def from_params(
        cls, profile: Profile, params: Mapping[str, Floats]
    ) -> "Quantization":
        """Make a quantization of ``params`` by their names in a store.

        Raises
        ------
        TypeError
            A parameter is missing.
        """
        fields: dict[str, Any] = {_FIELDS.get(n, n): v for n, v in params.items()}
        return cls(profile, **fields)

    @property
    def has_row_scales(self) -> bool:
        """Whether every row has a scale of its own."""
        return self.profile == "q8"

    @property
    def params(self) -> dict[str, Floats]:
        """Parameters by name, those in use."""
        values = {name: getattr(self, _FIELDS.get(name, name)) for name in TABLES}
        return {name: value for name, value in values.items() if value is not None}

    @cached_property
    def decoder(self) -> dict[str, npt.NDArray[Any]]:
        """What `dequantize` reads, all of one dtype.

        Float32 without a rotation. With one float64, and ``weights`` (C, C), see
        `_exact_weights`, in place of scales and rotation.
        """
        params: dict[str, npt.NDArray[Any]] = dict(self.params)
        if self.rotation is None:
            return params
        largest = -float(np.iinfo(DTYPES[self.profile]).min)
        if self.zero_point is not None:
            largest += float(np.abs(self.zero_point).max())
        found: dict[str, npt.NDArray[Any]] = {
            name: values.astype(np.float64)
            for name, values in params.items()
            if name in ("mean", "zero")
        }
        found["weights"] = _exact_weights(self.channel_scale, self.rotation, largest)
        return found

    def encode(
        self, values: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.float16] | None]:
        """Integers for ``values`` (M, ..., C), and scales (M,) of their rows for q8.

        Raises
        ------
        OverflowError
            A value is too far from the others for these integers.
        """
        scaled: npt.NDArray[Any] = values.astype(np.float32, copy=False) - self.mean
        if self.rotation is not None:
            # In float32 the order of the sums, which depends on the processor and on
            # the number of threads, would decide about integers.
            scaled = _product(scaled.astype(np.float64), self.rotation.T)
        scaled /= self.channel_scale
        if self.zero_point is not None:
            scaled += self.zero_point
        if self.profile == "compact":
            return _integers(scaled, np.dtype(np.int16)), None
        scale = _row_scale(scaled)
        # Rows of zeros have scale 0.
        divisor = np.where(scale > 0, scale, 1).astype(np.float32)
        scaled /= _broadcast_rows(divisor, scaled)
        return _integers(scaled, np.dtype(np.int8)), scale

    def decode(
        self, integers: npt.NDArray[Any], scale: npt.NDArray[np.float16] | None
    ) -> Floats:
        """Values (M, ..., C) float32 behind integers and the scales of their rows.

        The bits of a row do not depend on the other rows, nor on the processor.
        """
        if self.rotation is None:
            return self._decode_rows(integers, scale)
        decoded = np.empty(integers.shape, np.float32)
        for first in range(0, len(integers), PIECE_ROWS):
            piece = slice(first, first + PIECE_ROWS)
            rows = None if scale is None else scale[piece]
            decoded[piece] = self._decode_rows(integers[piece], rows)
        return decoded

    def _decode_rows(
        self, integers: npt.NDArray[Any], scale: npt.NDArray[np.float16] | None
    ) -> npt.NDArray[Any]:
        dtype = self.decoder["mean"].dtype
        rows = None if scale is None else _broadcast_rows(scale.astype(dtype), integers)
        return np.asarray(dequantize(integers.astype(dtype), rows, self.decoder))

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


def dequantize(values: Any, row_scale: Any, decoder: Mapping[str, Any]) -> Any:
    """Decoded features; numpy arrays or torch tensors alike.

    ``values`` (M, ..., C) are integers in the dtype of ``decoder``, see
    `Quantization.decoder`, and so is what is returned. Round it to float32.
    ``row_scale`` is None or broadcasts against ``values``.
    """
    if "zero" in decoder:
        values = values - decoder["zero"]
    if "weights" in decoder:
        scaled = _product(values, decoder["weights"])
    else:
        scaled = values * decoder["channel_scale"]
    if row_scale is not None:
        scaled = scaled * row_scale
    return scaled + decoder["mean"]


def _product(values: Any, matrix: Any) -> Any:
    """``values`` (..., C) times ``matrix`` (C, C), as one product of two matrices."""
    return (values.reshape(-1, values.shape[-1]) @ matrix).reshape(values.shape)


def _exact_weights(
    channel_scale: Floats, rotation: Floats, largest: float
) -> npt.NDArray[np.float64]:
    """(C, C) scaled ``rotation``, rounded to multiples of a power of two.

    The power is so large that sums of products with whole numbers up to ``largest``
    are exact in float64, in any order and with fused operations too. The weights are
    rounded by less than float32 rounds the result.
    """
    exact = channel_scale.astype(np.float64)[:, None] * rotation.astype(np.float64)
    # Rounded correctly, other than a sum by numpy, so that all processors agree.
    bound = largest * max(math.fsum(column) for column in np.abs(exact).T.tolist())
    # A bit is kept free, since rounding may enlarge every weight.
    unit = math.ldexp(1.0, math.frexp(bound)[1] + 1 - _EXACT_BITS)
    return np.rint(exact / unit) * unit


def relative_error(sums: npt.NDArray[np.float64]) -> float:
    """Squared error relative to the variance, from rows of `Quantization.error`."""
    wrong, size = sums.reshape(-1, 2).sum(axis=0).tolist()
    return wrong / size if size > 0 else 0.0


def _integers(values: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    limit = np.iinfo(dtype).max
    np.rint(values, out=values)
    largest = _largest(values)
    if largest > limit:
        raise OverflowError(f"{largest:.3g} steps from the mean, {limit} fit")
    return values.astype(dtype)


def _largest(values: npt.NDArray[Any]) -> float:
    return float(max(values.max(initial=0), -values.min(initial=0)))


def _row_scale(scaled: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
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


def _broadcast_rows(
    scale: npt.NDArray[Any], values: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    return scale.reshape(-1, *[1] * (values.ndim - 1))
