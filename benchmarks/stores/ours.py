"""Our own store, and zarr-python's reads of the very same files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr

from pipeline.store.calibration import CALIBRATION_ROWS, calibrate
from pipeline.store.layout import BlockPlan, plan_blocks
from pipeline.store.quantization import ERROR
from pipeline.store.reader import FeatureStore
from pipeline.store.writer import ArrayPlan, SplitPlan, StoreWriter, create_store
from stores.data import Arrays, Column, Indices, Samples
from stores.timing import Stopwatch

ROWS_PER_BLOCK = 16384
SPLIT = "train"


def faithful(column: Column) -> ArrayPlan:
    """Array that keeps a column's bytes as they are."""
    level = "node" if column.per_atom else "sample"
    return ArrayPlan(column.path, level, column.shape, column.dtype)


def q8(column: Column) -> ArrayPlan:
    """Array that keeps features as int8 with a scale for every row."""
    if column.dtype != "float16":
        return faithful(column)
    rows = np.random.default_rng(1).standard_normal((CALIBRATION_ROWS, *column.shape))
    chosen = calibrate(rows.astype(np.float32), "q8", 0.0)
    return ArrayPlan(column.path, "node", column.shape, "int8", {}, chosen)


class Ours:
    """Our store; ``plan`` says how an array is kept, which is all a profile changes.

    A store that is not ``exact`` is read as it is stored, as training does, and decoded
    only to be checked.
    """

    slow = False

    def __init__(
        self, name: str, plan: Callable[[Column], ArrayPlan] = faithful
    ) -> None:
        self.name = name
        self.files = name
        self.exact = plan is faithful
        self._plan = plan

    def write(self, folder: Path, samples: Samples, watch: Stopwatch) -> None:
        """Plan, create, fill and seal a store."""
        blocks = blocks_of(samples)
        ids = [str(index) for index in blocks.order]
        arrays = tuple(self._plan(column) for column in samples.columns)
        checksums = np.zeros(len(ids), np.uint64)
        split = SplitPlan(SPLIT, ids, checksums, blocks, arrays)
        create_store(folder / "store", [split], {"fingerprint": "benchmark"})
        writer = StoreWriter(folder / "store")
        pending = writer.pending_blocks(SPLIT)
        members = np.split(blocks.order, blocks.block_bounds[1:-1])
        values = (samples.take(members[block]) for block in pending)
        for block, arrays_of_block in zip(pending, watch.outside(values), strict=True):
            writer.write_block(SPLIT, block, arrays_of_block)
        writer.seal()

    def open(self, folder: Path, samples: Samples) -> "OurReader":
        """Opened store."""
        return OurReader(folder / "store", samples, self.exact)


class OurReader:
    """Reads through `FeatureStore`, by storage position."""

    def __init__(self, path: Path, samples: Samples, exact: bool) -> None:
        self.exact = exact
        self._split = FeatureStore.open(path).splits[SPLIT]
        self._paths = [column.path for column in samples.columns]
        self._stored = [
            path
            for field in self._paths
            for path in (field, *self._split.arrays[field].scale_arrays)
            if not path.endswith(ERROR)
        ]
        # Ids were written as the numbers of the dataset's order.
        self._position = np.argsort(self._split.sample_ids.astype(np.int64))

    def read(self, batch: Indices) -> Arrays:
        """See `Reader`."""
        return self._split.read_stored(self._position[batch], self._stored)

    def decoded(self, batch: Indices) -> Arrays:
        """The same decoded."""
        return self._split.read(self._position[batch], self._paths)

    def close(self) -> None:
        """Unmap the shards."""
        del self._split


class ZarrOnOurs:
    """zarr-python slices our files sample by sample, as any Zarr program would."""

    slow = True

    def __init__(self, ours: Ours) -> None:
        self.name = f"zarr-python on {ours.name}"
        self.files = ours.files
        self.write = ours.write

    def open(self, folder: Path, samples: Samples) -> "ZarrReader":
        """Arrays of a store that was written at ``folder``."""
        return ZarrReader(folder / "store" / SPLIT, samples, blocks_of(samples))


class ZarrReader:
    """A slice a sample of every array, joined with numpy."""

    def __init__(self, path: Path, samples: Samples, blocks: BlockPlan) -> None:
        self._columns = samples.columns
        self._arrays = {
            c.path: zarr.open_array(path / c.path, mode="r") for c in samples.columns
        }
        self._blocks = blocks
        self._position = np.argsort(blocks.order)

    def read(self, batch: Indices) -> Arrays:
        """See `Reader`."""
        blocks, positions = self._blocks, self._position[batch]
        start = blocks.start[positions]
        spans = {
            True: (start, start + blocks.n_atoms[positions]),
            False: (blocks.sample_row[positions], blocks.sample_row[positions] + 1),
        }
        read: Arrays = {}
        for column in self._columns:
            array, span = self._arrays[column.path], spans[column.per_atom]
            ranges = zip(*(bound.tolist() for bound in span), strict=True)
            read[column.path] = np.concatenate([array[i:j] for i, j in ranges])
        return read

    def close(self) -> None:
        """Nothing is held."""


def blocks_of(samples: Samples) -> BlockPlan:
    """Plan of the store of these samples."""
    return plan_blocks(samples.n_atoms, ROWS_PER_BLOCK)
