"""HDF5 with a contiguous dataset an array; needs the optional package h5py."""

import os
from pathlib import Path

import numpy as np

from stores.data import Arrays, Indices, Samples
from stores.timing import Stopwatch

try:
    import h5py
except ImportError:
    h5py = None

PART = 256


class Hdf5:
    """Contiguous and unchunked, which is the fastest for rows of known number."""

    name = "HDF5 contiguous"
    files = "hdf5"
    slow = False
    available = h5py is not None

    def write(self, folder: Path, samples: Samples, watch: Stopwatch) -> None:
        """Fill datasets of the full size, sync once."""
        file = folder / "data.h5"
        atoms = int(samples.n_atoms.sum())
        with h5py.File(file, "w") as store:
            for column in samples.columns:
                length = atoms if column.per_atom else len(samples)
                store.create_dataset(column.path, (length, *column.shape), column.dtype)
            done = {column.path: 0 for column in samples.columns}
            for _, part in watch.outside(samples.parts(PART)):
                for path, rows in part.items():
                    store[path][done[path] : done[path] + len(rows)] = rows
                    done[path] += len(rows)
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def open(self, folder: Path, samples: Samples) -> "Hdf5Reader":
        """Opened file."""
        return Hdf5Reader(folder / "data.h5", samples)


class Hdf5Reader:
    """A slice a sample of every dataset, read straight into the batch's arrays."""

    def __init__(self, file: Path, samples: Samples) -> None:
        self._store = h5py.File(file, "r")
        self._columns = samples.columns
        self._datasets = {c.path: self._store[c.path] for c in samples.columns}
        self._n_atoms = samples.n_atoms
        self._start = np.cumsum(samples.n_atoms) - samples.n_atoms

    def read(self, batch: Indices) -> Arrays:
        """See `Reader`."""
        counts = self._n_atoms[batch]
        spans = {
            True: (self._start[batch], counts),
            False: (batch, np.ones_like(batch)),
        }
        read: Arrays = {}
        for column in self._columns:
            first, rows = spans[column.per_atom]
            end = np.cumsum(rows)
            joined = np.empty((int(end[-1]), *column.shape), column.dtype)
            dataset = self._datasets[column.path]
            for i, n, j in zip(
                first.tolist(), rows.tolist(), end.tolist(), strict=True
            ):
                dataset.read_direct(joined, np.s_[i : i + n], np.s_[j - n : j])
            read[column.path] = joined
        return read

    def close(self) -> None:
        """Close the file."""
        self._datasets.clear()
        self._store.close()
