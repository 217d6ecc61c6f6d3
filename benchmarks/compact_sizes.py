"""Size and error of a field in every profile, beside what theory allows."""

from collections.abc import Iterator

import numpy as np
from compact_measure import (
    Sample,
    blosc_bits,
    entropy_bits,
    gaussian_bits,
    packed_bits,
    squared_error,
)

from pipeline.store.calibration import calibrate

ERRORS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
Line = tuple[str, float, float, str, float | None, float | None]
HEADER = (
    f"{'stored as':26} {'÷ float32':>9} {'smaller':>8} {'error':>8}  "
    f"{'form':8} {'entropy':>8} {'Gaussian':>8}"
)


def size_table(sample: Sample) -> list[str]:
    """Lines of the table of one field."""
    return [sample.title, HEADER, *(_rendered(line) for line in _lines(sample))]


def _rendered(line: Line) -> str:
    name, bits, error, how, entropy, gaussian = line
    bounds = " ".join(
        f"{'' if value is None else f'{32 / value:.2f}x':>8}"
        for value in (entropy, gaussian)
    )
    size = f"{bits / 32:9.3f} {32 / bits:7.2f}x"
    return f"{name:26} {size} {error:8.2e}  {how:8} {bounds}".rstrip()


def _lines(sample: Sample) -> Iterator[Line]:
    yield ("float32", 32.0, 0.0, "", None, None)
    yield from _halves(sample)
    yield _q8(sample)
    for error in ERRORS:
        yield _compact(sample, error)


def _halves(sample: Sample) -> Iterator[Line]:
    halves = sample.held.astype(np.float16)
    center = sample.fitted.mean(axis=0) if sample.held.ndim == 2 else np.float32(0)
    error = squared_error(sample.held, halves.astype(np.float32), np.asarray(center))
    yield ("float16", 16.0, error, "", None, None)
    for name, transposed in (("", False), (", transposed", True)):
        bits = blosc_bits(halves, transposed=transposed)
        yield (f"float16 + zstd{name}", bits, error, "", None, None)


def _q8(sample: Sample) -> Line:
    encoding = calibrate(sample.fitted, "q8", 0.0).encoding
    decoded = encoding.decode(*encoding.encode(sample.held))
    error = squared_error(sample.held, decoded, encoding.mean)
    # A byte each, and two for the scale of the row.
    bits = 8 + 16 * len(sample.held) / sample.held.size
    return ("q8", bits, error, "", None, None)


def _compact(sample: Sample, stated: float) -> Line:
    chosen = calibrate(sample.fitted, "compact", stated)
    encoding = chosen.encoding
    integers, _ = encoding.encode(sample.held)
    error = squared_error(sample.held, encoding.decode(integers, None), encoding.mean)
    assert chosen.clevel is not None
    return (
        f"compact at {stated:g}",
        packed_bits(integers, chosen.clevel),
        error,
        "rotated" if encoding.rotation is not None else "as it is",
        entropy_bits(integers),
        gaussian_bits(sample.held - encoding.mean, error),
    )
