"""Other ways to pack the integers of `compact`, each at the error of ours."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from compact_measure import (
    Floats,
    Integers,
    Sample,
    blosc_bits,
    entropy_bits,
    packed_bits,
    squared_error,
)
from numcodecs import blosc

from pipeline.store.calibration import EFFORT, Calibration, calibrate
from pipeline.store.compressed import BLOCK_BYTES

ERROR = 1e-3
THRESHOLDS = (0.55, 0.6, 0.65)
Trial = tuple[str, float | None]


@dataclass(frozen=True)
class Packed:
    """Held-out rows as calibration has them packed: ``steps`` before rounding."""

    sample: Sample
    chosen: Calibration
    steps: Floats
    integers: Integers

    @property
    def bits(self) -> float:
        """Bits per number."""
        assert self.chosen.clevel is not None
        return packed_bits(self.integers, self.chosen.clevel)

    @property
    def error(self) -> float:
        """Held-out error relative to the variance."""
        encoding, held = self.chosen.encoding, self.sample.held
        decoded = encoding.decode(self.integers, None)
        return squared_error(held, decoded, encoding.mean)


def packed(sample: Sample, error: float = ERROR) -> Packed:
    """A sample packed as the store would."""
    chosen = calibrate(sample.fitted, "compact", error)
    encoding = chosen.encoding
    scaled = sample.held - encoding.mean
    if encoding.rotation is not None:
        scaled = scaled @ encoding.rotation.T
    integers, _ = encoding.encode(sample.held)
    return Packed(sample, chosen, scaled / encoding.channel_scale, integers)


def trial_table(samples: Sequence[Sample]) -> list[str]:
    """Lines: every trial's size over ours, a column for every sample."""
    lines = [f"{i + 1:2} {s.store} {s.field}" for i, s in enumerate(samples)]
    columns = [list(_trials(packed(sample))) for sample in samples]
    numbers = " ".join(f"{i + 1:6}" for i in range(len(samples)))
    lines += ["", f"{'size of':46} {numbers}"]
    for row in zip(*columns, strict=True):
        cells = " ".join(f"{'' if x is None else f'{x:.3f}':>6}" for _, x in row)
        lines.append(f"{row[0][0]:46} {cells}")
    return lines


def _trials(ours: Packed) -> Iterator[Trial]:
    yield "ours, ÷ float32", ours.bits / 32
    yield "its entropy by channel ÷ ours", entropy_bits(ours.integers) / ours.bits
    others = (*_codecs(ours), *_orders(ours), *_thresholds(ours), *_means(ours))
    for name, bits in others:
        yield name, None if bits is None else bits / ours.bits


def _codecs(ours: Packed) -> Iterator[Trial]:
    counted = ours.integers
    signed = (counted - 128).astype(np.int16)
    plain, bit = blosc.SHUFFLE, blosc.BITSHUFFLE
    before = _best(signed, bit, 0, rows=256, efforts=(2, 5))
    yield "from 0, bits shuffled, one block, 256 rows", before
    yield "from 0, bits shuffled", _best(signed, bit, BLOCK_BYTES)
    yield "from 0, bytes shuffled", _best(signed, plain, BLOCK_BYTES)
    yield "bits shuffled", _best(counted, bit, BLOCK_BYTES)
    small = np.abs(signed).max() <= 127
    name = "from 0, int8 where all fit"
    yield (
        name,
        _best(signed.astype(np.int8), plain, BLOCK_BYTES // 2) if small else None,
    )
    for block in (4096, 65536):
        yield f"blocks of {block // 1024} KiB", _best(counted, plain, block)
    for rows in (256, 512):
        yield f"{rows} rows", _best(counted, plain, BLOCK_BYTES, rows=rows)
    for clevel in (1, 2, 5, 7):
        bits = _best(counted, plain, BLOCK_BYTES, efforts=(clevel,))
        yield f"level {clevel}", bits


def _best(
    integers: npt.NDArray[np.generic],
    shuffle: int,
    block: int,
    rows: int = 1024,
    efforts: Sequence[int] = (1, EFFORT),
) -> float:
    return min(
        blosc_bits(integers, shuffle=shuffle, clevel=clevel, block=block, rows=rows)
        for clevel in efforts
    )


def _orders(ours: Packed) -> Iterator[Trial]:
    """Rows of a chunk sorted by element, which readers would have to undo."""
    elements = ours.sample.elements[-len(ours.integers) :].reshape(-1, 1024)
    order = np.argsort(elements, axis=1, kind="stable")
    order += 1024 * np.arange(len(order))[:, None]
    ordered = ours.integers[order.ravel()]
    yield (
        "rows of a chunk sorted by element",
        _best(ordered, blosc.SHUFFLE, BLOCK_BYTES),
    )


def _thresholds(ours: Packed) -> Iterator[Trial]:
    """Rounded up only above a larger fraction, with the step that errs as much."""
    for threshold in THRESHOLDS:
        integers = _dead_zone(ours.steps, threshold)
        counted = (integers + 128).astype(np.int16)
        bits = _best(counted, blosc.SHUFFLE, BLOCK_BYTES)
        yield f"rounded up from {threshold:g}, equal error", bits


def _dead_zone(steps: Floats, threshold: float) -> npt.NDArray[np.float32]:
    """Integers in steps of another size, with the error of plain rounding."""
    allowed = float(np.mean(np.square(np.rint(steps) - steps, dtype=np.float64)))
    low, high = 0.5, 2.0
    for _ in range(20):
        size = (low + high) / 2
        wrong = _rounded(steps / size, threshold) * size - steps
        if float(np.mean(np.square(wrong, dtype=np.float64))) <= allowed:
            low = size
        else:
            high = size
    return _rounded(steps / np.float32(low), threshold)


def _rounded(values: Floats, threshold: float) -> Floats:
    return np.copysign(np.floor(np.abs(values) + np.float32(1 - threshold)), values)


def _means(ours: Packed) -> Iterator[Trial]:
    """A mean for every element instead of one for all; vectors have none."""
    name, sample = "means of elements removed, equal error", ours.sample
    if sample.held.ndim > 2:
        yield name, None
        return
    first = len(sample.fitted)
    elements = sample.elements[:first]
    overall = sample.fitted.mean(axis=0)
    table = np.tile(overall, (256, 1))
    for element in np.unique(elements):
        table[element] = sample.fitted[elements == element].mean(axis=0)
    fitted = sample.fitted - table[elements]
    held = sample.held - table[sample.elements[first:]]
    share = np.square(sample.fitted - overall).sum() / np.square(fitted).sum()
    without = packed(replace(sample, fitted=fitted, held=held), ERROR * float(share))
    own = np.square(held - without.chosen.encoding.mean).sum()
    variance = np.square(sample.held - ours.chosen.encoding.mean).sum()
    error = without.error * float(own / variance)
    # Bits that the little difference in error is worth.
    yield name, without.bits + np.log2(error / ours.error) / 2
