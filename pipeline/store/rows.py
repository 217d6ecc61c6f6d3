"""Checks the rows of a block and turns them into what is stored; names bad samples."""

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError, StoreError
from pipeline.store.index import ArrayInfo, SplitIndex
from pipeline.store.quantization import ERROR, SCALE, Quantization

_PIECE_BYTES = 1 << 20
# Numbers looked at together: they stay in the processor's cache.
_PIECE_BITS = 65536
# By bytes of a number: integers of its size, and the exponent of infinity among them.
_EXPONENTS: dict[int, tuple[Any, int]] = {
    2: (np.uint16, 0x7C00),
    4: (np.uint32, 0x7F800000),
    8: (np.uint64, 0x7FF0000000000000),
}


def encode_rows(
    index: SplitIndex, block: int, info: ArrayInfo, rows: npt.NDArray[Any]
) -> dict[str, npt.NDArray[Any]]:
    """Rows of ``info`` and of its companions, by path, in the planned dtypes.

    Raises
    ------
    DataError
        A value is no number or does not fit what it is stored as; names its sample.
    StoreError
        Shape or kind of the rows are not what was planned.
    """
    if info.encoding is None:
        return {info.path: _check_rows(index, block, info, rows)}
    dtype = rows.dtype if rows.dtype.kind == "f" else np.dtype(np.float32)
    as_given = ArrayInfo(info.path, info.level, dtype, info.shape)
    exact = _check_rows(index, block, as_given, rows)
    try:
        integers, scale, sums = _quantize(info, info.encoding, exact)
    except OverflowError as error:
        far = np.abs(exact.astype(np.float32) - info.encoding.mean)
        far = far.reshape(len(far), -1).max(axis=1)
        raise DataError(
            f"{_blame(index, block, info, far == far.max())} has a value in "
            f"{info.path!r} that profile {info.encoding.profile} cannot hold "
            f"({error}); set `profile: faithful` for that field in the spec."
        ) from None
    positions = index.block_positions(block)
    _, counts = index.spans(info.level, slice(positions.start, positions.stop))
    owner = np.repeat(np.arange(len(counts)), counts)
    by_sample = [np.bincount(owner, column, len(counts)) for column in sums.T]
    stored = {info.path: integers, info.path + ERROR: np.stack(by_sample, axis=1)}
    return stored if scale is None else {**stored, info.path + SCALE: scale}


def _quantize(
    info: ArrayInfo, encoding: Quantization, exact: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float16] | None, npt.NDArray[np.float64]]:
    """Integers, scales of rows and `Quantization.error` of ``exact``.

    A few rows at a time, which stay in the processor's cache.
    """
    integers = np.empty(exact.shape, info.dtype)
    scales = np.empty(len(exact), np.float16)
    sums = np.empty((len(exact), 2), np.float64)
    scaled = False
    step = max(1, _PIECE_BYTES // (4 * int(np.prod(info.shape))))
    for first in range(0, len(exact), step):
        piece = slice(first, first + step)
        integers[piece], scale = encoding.encode(exact[piece])
        if scale is not None:
            scales[piece] = scale
            scaled = True
        decoded = encoding.decode(integers[piece], scale)
        sums[piece] = encoding.error(exact[piece], decoded)
    return integers, scales if scaled else None, sums


def _check_rows(
    index: SplitIndex, block: int, info: ArrayInfo, rows: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    """``rows`` in the planned dtype, or an error that names the first bad sample."""
    expected = (index.valid_rows(info.level, block), *info.shape)
    where = f"{info.path!r} of block {block} of split {index.name!r}"
    if rows.shape != expected:
        raise StoreError(f"{where} has shape {rows.shape}, planned is {expected}.")
    if info.dtype.kind != "f":
        return _check_integers(index, block, info, rows)
    if rows.dtype.kind != "f":
        raise StoreError(f"{where} has dtype {rows.dtype}, planned is {info.dtype}.")
    if not _all_finite(rows):
        bad = ~np.isfinite(rows)
        if info.may_be_nan:
            bad &= ~np.isnan(rows)
        if bad.any():
            raise DataError(
                f"{_blame(index, block, info, bad)} has a NaN or infinite value in "
                f"{info.path!r}; check this structure or leave it out."
            )
    return _round_to_dtype(index, block, info, rows)


def _all_finite(rows: npt.NDArray[Any]) -> bool:
    """Whether no number is NaN or infinite, told by exponents.

    Many times faster than numpy's own test of half precision, and without a mask.
    """
    kind, exponent = _EXPONENTS[rows.dtype.itemsize]
    bits = np.ascontiguousarray(rows).reshape(-1).view(kind)
    magnitude = kind(np.iinfo(kind).max >> 1)
    pieces = (bits[i : i + _PIECE_BITS] for i in range(0, len(bits), _PIECE_BITS))
    return all((piece & magnitude).max(initial=0) < exponent for piece in pieces)


def _round_to_dtype(
    index: SplitIndex, block: int, info: ArrayInfo, rows: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    """``rows`` in the planned precision, which must have room for them."""
    limit = np.finfo(info.dtype).max
    narrower = rows.dtype.itemsize > info.dtype.itemsize and rows.size > 0
    if narrower and max(np.nanmax(rows), -np.nanmin(rows)) > limit:
        large = np.abs(rows) > limit
        raise DataError(
            f"{_blame(index, block, info, large)} has a value above {limit:g} in "
            f"{info.path!r}, too large for {info.dtype.name}; set `dtype: "
            f"{'float32' if info.dtype.itemsize == 2 else 'float64'}` for that "
            "field in the spec."
        )
    return rows.astype(info.dtype, copy=False)


def _check_integers(
    index: SplitIndex, block: int, info: ArrayInfo, rows: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    cast = rows.astype(info.dtype, copy=False) if rows.dtype.kind in "biu" else None
    if cast is None:
        raise StoreError(
            f"{info.path!r} of block {block} of split {index.name!r} has dtype "
            f"{rows.dtype}, planned is {info.dtype}."
        )
    changed = cast != rows
    if changed.any():
        raise DataError(
            f"{_blame(index, block, info, changed)} has a value in {info.path!r} that "
            f"does not fit {info.dtype.name}; correct it in the dataset."
        )
    return cast


def _blame(
    index: SplitIndex, block: int, info: ArrayInfo, bad: npt.NDArray[np.bool_]
) -> str:
    first = int(bad.reshape(len(bad), -1).any(axis=1).argmax())
    row = block * index.rows(info.level) + first
    (sample,) = index.find_samples(info.level, row, row + 1)
    return f"Sample {sample!r} of split {index.name!r}"
