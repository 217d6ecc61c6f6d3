"""Samples of a store by position: what training and evaluation need of a split."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.store.quantization import Quantization
from pipeline.store.reader import ArrayInfo

Indices = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]


class Split(Protocol):
    """Samples by position, as ``pipeline.store.reader.SplitReader`` reads them."""

    def __len__(self) -> int: ...

    @property
    def name(self) -> str:
        """Name of the split."""

    @property
    def sample_ids(self) -> npt.NDArray[Any]:
        """(n,) ids, of numpy's string dtype."""

    @property
    def n_atoms(self) -> npt.NDArray[np.int32]:
        """(n,) atoms of every sample."""

    @property
    def checksums(self) -> npt.NDArray[np.uint64]:
        """(n,) hash of every sample's structure."""

    @property
    def n_edges(self) -> Indices:
        """(n,) edges of every sample.

        Raises StoreError if no edges are stored.
        """

    @property
    def arrays(self) -> dict[str, ArrayInfo]:
        """Dtype, trailing shape and level of every array by its path."""

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""

    def block_positions(self, block: int) -> range:
        """Return the positions of the samples of ``block``."""

    def encoding(self, path: str) -> Quantization | None:
        """Return the encoding of the rows of `read_stored`, None for plain numbers."""

    def max_shuffle_blocks(self, paths: Sequence[str]) -> int | None:
        """Return the maximum number of blocks to read at a time, None if unlimited."""

    def read(self, positions: npt.ArrayLike, paths: Sequence[str]) -> Arrays:
        """Read rows of the samples at ``positions``, in that order, as new arrays."""

    def read_stored(self, positions: npt.ArrayLike, paths: Sequence[str]) -> Arrays:
        """Read rows without decoding; ``paths`` may contain row scales."""
