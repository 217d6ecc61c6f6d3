"""What every dataset offers to planning and building."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError
from pipeline.execution.passes import Run
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

    @property
    def keeps_samples(self) -> bool:
        """Whether the samples lie in memory from when the dataset is opened."""
        return False

    def check_ids(self) -> None:
        """Raise DataError when the dataset is empty or repeats a sample id."""
        if len(self) == 0:
            raise DataError(f"{self.path} holds no samples.")
        if len(set(self.sample_ids)) == len(self):
            return
        seen: dict[str, int] = {}
        for index, sample_id in enumerate(self.sample_ids):
            if sample_id in seen:
                raise DataError(
                    f"{self.path}: samples {seen[sample_id]} and {index} share the id "
                    f"{sample_id!r}; ids must be unique within a split."
                )
            seen[sample_id] = index


class DerivedDataset(Dataset):
    """Samples of another dataset, changed as they are read; alike in all else."""

    def __init__(self, inner: Dataset) -> None:
        self.path = inner.path
        self._inner = inner

    def __len__(self) -> int:
        return len(self._inner)

    @property
    def sample_ids(self) -> Sequence[str]:
        """Ids in the order of the source."""
        return self._inner.sample_ids

    @property
    def n_atoms(self) -> npt.NDArray[np.int32]:
        """Atoms of every sample, (n,) int32."""
        return self._inner.n_atoms

    @property
    def keeps_samples(self) -> bool:
        """Whether the samples lie in memory from when the dataset is opened."""
        return self._inner.keeps_samples


@dataclass(frozen=True, eq=False)
class Listing:
    """What the pass over the files of a dataset tells of its samples.

    ``n_atoms`` (n,) int32; ``places`` are columns (n,) with which a format finds a
    sample again.
    """

    ids: list[str]
    n_atoms: npt.NDArray[np.int32]
    places: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


class IndexedDataset(Dataset):
    """A dataset whose samples are listed, in one pass over its files, to be found.

    Made without a listing; `list_samples` or an earlier pass gives it to `use`.
    """

    # Dtypes of the places that a listing has.
    columns: ClassVar[dict[str, str]] = {}

    def __init__(self, path: str) -> None:
        self.path = path
        self._ids: list[str] = []
        self._n_atoms: npt.NDArray[np.int32] = np.zeros(0, np.int32)

    @abstractmethod
    def files(self) -> list[Path]:
        """All files with samples; what a listing says holds until one changes."""

    @abstractmethod
    def list_samples(self, run: Run = map) -> Listing:
        """Read the files once, in the processes of ``run``.

        Raises
        ------
        DataError
            A file is damaged or of another format.
        """

    def use(self, listing: Listing) -> None:
        """Take ``listing`` for that of this dataset."""
        self._ids = listing.ids
        self._n_atoms = listing.n_atoms

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


def in_pieces(items: Any, size: int) -> list[Any]:
    """Runs of ``size`` consecutive items of a sequence or an array."""
    return [items[first : first + size] for first in range(0, len(items), size)]
