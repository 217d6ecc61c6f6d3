"""Some samples of a split, read as a separate split."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kd_train.loader.split import Arrays, Indices, Split
from pipeline.store.quantization import Quantization
from pipeline.store.reader import ArrayInfo


class SubsetSplit:
    """The samples of ``split`` at ``positions``, in that order and as one block."""

    def __init__(self, split: Split, positions: Indices) -> None:
        self._split = split
        self._positions = positions

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def name(self) -> str:
        """Name of the split."""
        return self._split.name

    @property
    def sample_ids(self) -> npt.NDArray[np.str_]:
        """(n,) ids, of numpy's string dtype."""
        ids: npt.NDArray[np.str_] = self._split.sample_ids[self._positions]
        return ids

    @property
    def n_atoms(self) -> npt.NDArray[np.int32]:
        """(n,) atoms of every sample."""
        return self._split.n_atoms[self._positions]

    @property
    def checksums(self) -> npt.NDArray[np.uint64]:
        """(n,) hash of every sample's structure."""
        return self._split.checksums[self._positions]

    @property
    def n_edges(self) -> Indices:
        """(n,) edges of every sample.

        Raises StoreError if no edges are stored.
        """
        return self._split.n_edges[self._positions]

    @property
    def arrays(self) -> dict[str, ArrayInfo]:
        """Dtype, trailing shape and level of every array by its path."""
        return self._split.arrays

    @property
    def n_blocks(self) -> int:
        """One."""
        return 1

    def block_positions(self, block: int) -> range:
        """Return all positions."""
        return range(len(self))

    def encoding(self, path: str) -> Quantization | None:
        """Return the encoding of the rows of `read_stored`, None for plain numbers."""
        return self._split.encoding(path)

    def max_shuffle_blocks(self, paths: Sequence[str]) -> int | None:
        """Return the maximum number of blocks to read at a time, None if unlimited."""
        return self._split.max_shuffle_blocks(paths)

    def read(self, positions: npt.ArrayLike, paths: Sequence[str]) -> Arrays:
        """Read rows of the samples at ``positions``, in that order, as new arrays."""
        return self._split.read(self._positions[np.asarray(positions)], paths)

    def read_stored(self, positions: npt.ArrayLike, paths: Sequence[str]) -> Arrays:
        """Read rows without decoding; ``paths`` may contain row scales."""
        return self._split.read_stored(self._positions[np.asarray(positions)], paths)
