"""Features of a store in two parts, and what their size is measured against."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from numcodecs import blosc

from pipeline.fields import FIELDS
from pipeline.store.calibration import CALIBRATION_ROWS
from pipeline.store.compressed import CompressedLayout
from pipeline.store.layout import INNER_ROWS
from pipeline.store.reader import FeatureStore

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int16]
STRUCTURES = FIELDS["atomic_numbers"].path


@dataclass(frozen=True)
class Sample:
    """Rows of a field: ``fitted`` to calibrate on, ``held`` (whole chunks) to judge.

    ``elements`` are the atomic numbers of both, in that order.
    """

    store: str
    field: str
    dtype: str
    fitted: Floats
    held: Floats
    elements: npt.NDArray[np.uint8]

    @property
    def title(self) -> str:
        """One line that says what was measured."""
        shape = " x ".join(str(size) for size in self.held.shape[1:])
        return (
            f"{self.store} {self.field}, {shape} channels, stored as {self.dtype}: "
            f"calibrated on {len(self.fitted)} atoms, measured on {len(self.held)}"
        )


def samples_of(store: Path, split: str, rows: int) -> Iterator[Sample]:
    """Every node-level feature of a store, its first ``rows`` atoms or fewer."""
    reader = FeatureStore.open(store).splits[split]
    names = {f.path: name for name, f in FIELDS.items() if None in f.shape}
    count = int(np.searchsorted(np.cumsum(reader.n_atoms), rows)) + 1
    positions = np.arange(min(count, len(reader)))
    for path, info in reader.arrays.items():
        if path not in names or info.level != "node" or info.encoding is not None:
            continue
        found = reader.read(positions, [path, STRUCTURES])
        values = found[path].astype(np.float32)
        cut = min(CALIBRATION_ROWS, len(values) // 2)
        last = cut + (len(values) - cut) // INNER_ROWS * INNER_ROWS
        yield Sample(
            store.stem,
            names[path],
            info.dtype.name,
            values[:cut],
            values[cut:last],
            found[STRUCTURES][:last],
        )


def packed_bits(integers: Integers, clevel: int) -> float:
    """Bits per number that a shard of ``integers`` takes."""
    layout = CompressedLayout(len(integers), integers.dtype, integers.shape[1:], clevel)
    return 8 * len(layout.encode(integers)) / integers.size


def blosc_bits(
    values: npt.NDArray[np.generic],
    *,
    transposed: bool = True,
    shuffle: int = blosc.BITSHUFFLE,
    clevel: int = 5,
    block: int = 0,
    rows: int = INNER_ROWS,
) -> float:
    """Bits per number of chunks of ``values`` under other settings of blosc-zstd."""
    size = 0
    for chunk in values.reshape(-1, rows, *values.shape[1:]):
        turned = np.moveaxis(chunk, 0, -1) if transposed else chunk
        flat = np.ascontiguousarray(turned).reshape(-1)
        size += len(blosc.compress(flat, b"zstd", clevel, shuffle, block))
    return 8 * size / values.size


def entropy_bits(integers: Integers) -> float:
    """Bits per number of an ideal code that every channel has for itself."""
    flat = integers.reshape(-1, integers.shape[-1])
    bits = 0.0
    for channel in flat.T:
        _, counts = np.unique(channel, return_counts=True)
        share = counts / len(flat)
        bits -= float((share * np.log2(share)).sum())
    return bits / flat.shape[1]


def gaussian_bits(values: Floats, error: float) -> float:
    """Bits per number that a Gaussian of the same covariance needs at ``error``.

    By reverse water-filling: components with more variance than a common level keep
    that much error, the others are dropped. ``values`` (M, ..., C) are centred.
    """
    flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
    variances = np.linalg.eigvalsh(flat.T @ flat / len(flat)).clip(min=0)
    allowed = error * variances.sum()
    low, high = 0.0, float(variances.max())
    for _ in range(60):
        level = (low + high) / 2
        if np.minimum(variances, level).sum() < allowed:
            low = level
        else:
            high = level
    kept = variances[variances > high]
    return float(np.log2(kept / high).sum()) / 2 / len(variances)


def squared_error(values: Floats, approximation: Floats, center: Floats) -> float:
    """Squared error relative to the squared distance from ``center``."""
    wrong = np.square(approximation - values, dtype=np.float64).sum()
    return float(wrong / np.square(values - center, dtype=np.float64).sum())
