"""Chooses the encoding of a field from a sample of its values."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.store.compressed import CompressedLayout
from pipeline.store.index import ArrayInfo
from pipeline.store.layout import INNER_ROWS
from pipeline.store.quantization import Floats, Profile, Quantization

# Rows to calibrate with; more change the result by less than a percent.
CALIBRATION_ROWS = 8192
# Level of blosc-zstd: up to nine per cent smaller than lower ones on every field
# measured, at 70 to 160 MB of float32 a second; 7 takes twice as long for a percent.
EFFORT = 6
# Integers count from here, so that nearly all have the same upper byte: a negative
# number's differs from a positive one's, which would cost each its sign once more.
ZERO = 128
# Aimed at below the stated error, since a sample tells it within some percent.
MARGIN = 0.95
_BISECTIONS = 24


@dataclass(frozen=True, eq=False)
class Calibration:
    """An encoding and, for compact, the level of compression to store it with."""

    encoding: Quantization
    clevel: int | None = None


def known_calibration(info: ArrayInfo | None) -> Calibration | None:
    """Calibration that an existing array has; None where it has none."""
    if info is None or info.encoding is None:
        return None
    return Calibration(info.encoding, info.clevel)


def calibrate(
    values: npt.NDArray[np.floating], profile: Profile, error: float
) -> Calibration:
    """Encoding for values like ``values`` (M, C) or, for vectors, (M, 3, C).

    ``error`` is the squared error relative to the variance that ``compact`` may have;
    ``q8`` has the error it has. Of compact's forms, with and without rotation onto the
    principal components, the smallest at that error is taken.
    """
    exact = np.ascontiguousarray(values, np.float32)
    mean = np.zeros(exact.shape[-1], np.float32)
    if exact.ndim == 2:
        mean = exact.mean(axis=0, dtype=np.float64).astype(np.float32)
    centered: Floats = exact - mean
    if profile == "q8":
        return Calibration(Quantization("q8", _root_scale(centered), mean))
    # Components are fitted on one half, and their size is that of the other.
    fitted, _ = _halves(centered)
    choices = []
    for rotation in (None, _principal_axes(fitted)):
        rotated = centered if rotation is None else centered @ rotation.T
        step = _largest_step(rotated, MARGIN * error)
        scale = np.full(exact.shape[-1], step, np.float32)
        encoding = Quantization(
            "compact", scale, mean, rotation, np.full_like(scale, ZERO)
        )
        _, judged = _halves(rotated)
        integers = np.rint(judged / step + np.float32(ZERO)).astype(np.int16)
        choices.append((_packed_bytes(integers), encoding))
    return Calibration(min(choices, key=lambda choice: choice[0])[1], EFFORT)


def _root_scale(centered: Floats) -> Floats:
    """(C,) square roots of the channels' sizes: rows lose least by these (measured).

    Normalised so that the scale of an ordinary row is near one.
    """
    flat = centered.reshape(-1, centered.shape[-1])
    scale = np.sqrt(np.sqrt(np.mean(np.square(flat, dtype=np.float64), axis=0)))
    scale[scale == 0] = 1.0
    largest = np.abs(centered / scale).reshape(len(centered), -1).max(axis=1) / 127
    return (scale * (float(np.median(largest)) or 1.0)).astype(np.float32)


def _halves(centered: Floats) -> tuple[Floats, Floats]:
    if len(centered) < 2:
        return centered, centered
    return centered[::2], centered[1::2]


def _principal_axes(centered: Floats) -> Floats:
    """(C, C) orthogonal, rows by falling variance; directions of vectors are pooled."""
    flat = centered.reshape(-1, centered.shape[-1]).astype(np.float64)
    _, columns = np.linalg.eigh(flat.T @ flat)
    axes = columns[:, ::-1].T
    # An axis has two directions; which one comes out should not depend on last bits.
    largest = np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1)
    return np.ascontiguousarray(axes * np.sign(largest), np.float32)


def _largest_step(values: Floats, error: float) -> float:
    """Largest step whose rounding error is ``error`` of the values' squares at most."""
    allowed = error * float(np.mean(np.square(values, dtype=np.float64)))
    if allowed == 0:
        return 1.0
    # Rounding of values much wider than a step errs by step²/12; narrow ones by less.
    low = float(np.sqrt(12 * allowed))
    high = 2 * float(np.abs(values).max())
    if _rounding_error(values, low) > allowed:
        low, high = low / 2, low
    for _ in range(_BISECTIONS):
        middle = float(np.sqrt(low * high))
        if _rounding_error(values, middle) <= allowed:
            low = middle
        else:
            high = middle
    return low


def _rounding_error(values: Floats, step: float) -> float:
    difference = np.rint(values / np.float32(step)) * np.float32(step) - values
    return float(np.mean(np.square(difference, dtype=np.float64)))


def _packed_bytes(integers: npt.NDArray[np.int16]) -> int:
    rows = len(integers) // INNER_ROWS * INNER_ROWS or len(integers)
    layout = CompressedLayout(rows, integers.dtype, integers.shape[1:], EFFORT)
    return len(layout.encode(integers[:rows]))
