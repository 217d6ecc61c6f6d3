"""What every dataset offers to planning and building."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError
from pipeline.structure import Sample


@dataclass(frozen=True)
class Selection:
    """Samples from ``offset`` on, each ``every``-th of them, at most ``limit``."""

    offset: int = 0
    limit: int | None = None
    every: int = 1

    def of(self, total: int = sys.maxsize) -> range:
        """Chosen running numbers among ``total`` samples, ascending."""
        if self.limit is not None:
            total = min(total, self.offset + self.every * self.limit)
        return range(self.offset, total, self.every)


class Dataset(ABC):
    """Samples by position; indexable, picklable, readable from several threads."""

    path: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    @property
    @abstractmethod
    def sample_ids(self) -> Sequence[str]:
        """Ids in the order of the source."""

    @property
    @abstractmethod
    def n_atoms(self) -> npt.NDArray[np.int32]:
        """Atoms of every sample, (n,) int32."""

    def check_ids(self) -> None:
        """Raise DataError when the dataset is empty or repeats a sample id."""
        if len(self) == 0:
            raise DataError(f"{self.path} holds no samples.")
        seen: dict[str, int] = {}
        for index, sample_id in enumerate(self.sample_ids):
            if sample_id in seen:
                raise DataError(
                    f"{self.path}: samples {seen[sample_id]} and {index} share the id "
                    f"{sample_id!r}; ids must be unique within a split."
                )
            seen[sample_id] = index


class IndexedDataset(Dataset):
    """A dataset that has listed ids and atom counts when it was opened."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._ids: list[str] = []
        self._n_atoms: npt.NDArray[np.int32] = np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def sample_ids(self) -> Sequence[str]:
        """Ids in the order of the source."""
        return self._ids

    @property
    def n_atoms(self) -> npt.NDArray[np.int32]:
        """Atoms of every sample, (n,) int32."""
        return self._n_atoms
