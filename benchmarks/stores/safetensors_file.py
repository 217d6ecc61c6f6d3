"""safetensors with all samples in one file, a tensor an array, sliced by rows."""

import json
import os
import struct
from pathlib import Path

import numpy as np
from safetensors import safe_open

from stores.data import Arrays, Column, Indices, Samples
from stores.timing import Stopwatch

PART = 256
_CODES = {"float16": "F16", "float64": "F64", "uint8": "U8"}


class Safetensors:
    """The package writes from memory only, so a header and raw bytes are laid here.

    Reading is by its ``safe_open``.
    """

    name = "safetensors slices"
    files = "safetensors"
    slow = False

    def write(self, folder: Path, samples: Samples, watch: Stopwatch) -> None:
        """Header, then every array's bytes at its place, one sync."""
        header, offsets = _header(samples)
        with (folder / "data.safetensors").open("wb", buffering=0) as stream:
            stream.write(header)
            for _, part in watch.outside(samples.parts(PART)):
                for path, rows in part.items():
                    raw = rows.reshape(-1).view(np.uint8).data
                    os.pwrite(stream.fileno(), raw, len(header) + offsets[path])
                    offsets[path] += len(raw)
            os.fsync(stream.fileno())

    def open(self, folder: Path, samples: Samples) -> "SafetensorsReader":
        """Opened file."""
        return SafetensorsReader(folder / "data.safetensors", samples)


class SafetensorsReader:
    """A slice a sample of every tensor, joined with numpy."""

    def __init__(self, file: Path, samples: Samples) -> None:
        self._columns = samples.columns
        self._file = safe_open(file, framework="np")
        self._slices = {c.path: self._file.get_slice(c.path) for c in samples.columns}
        self._n_atoms = samples.n_atoms
        self._start = np.cumsum(samples.n_atoms) - samples.n_atoms

    def read(self, batch: Indices) -> Arrays:
        """See `Reader`."""
        start = self._start[batch]
        spans = {True: (start, start + self._n_atoms[batch]), False: (batch, batch + 1)}
        read: Arrays = {}
        for column in self._columns:
            rows = self._slices[column.path]
            bounds = (bound.tolist() for bound in spans[column.per_atom])
            ranges = zip(*bounds, strict=True)
            read[column.path] = np.concatenate([rows[i:j] for i, j in ranges])
        return read

    def close(self) -> None:
        """Unmap the file."""
        self._slices.clear()
        del self._file


def _header(samples: Samples) -> tuple[bytes, dict[str, int]]:
    """Length and JSON of the header, and where every array begins behind it."""
    entries, offsets, used = {}, {}, 0
    for column in sorted(samples.columns, key=_item_size, reverse=True):
        rows = int(samples.n_atoms.sum()) if column.per_atom else len(samples)
        offsets[column.path] = used
        used += rows * column.row_bytes
        entries[column.path] = {
            "dtype": _CODES[column.dtype],
            "shape": [rows, *column.shape],
            "data_offsets": [offsets[column.path], used],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets


def _item_size(column: Column) -> int:
    return np.dtype(column.dtype).itemsize
