"""What every dataset offers to planning and building."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pipeline.datasets.choosing import look_up, select_matching
from pipeline.datasets.labels import ReadOptions, Record, label_like, record_sample
from pipeline.errors import DataError
from pipeline.parallel.ordered_map import OrderedMap
from pipeline.structure import Sample

# A teacher's energy in eV and forces (N, 3) float32 in eV/Å.
KnownLabel = tuple[float, npt.NDArray[np.float32]]
# Samples whose values one process looks up at a time.
_PIECE = 512


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
    options: ReadOptions = ReadOptions()

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

    def label_names(self, index: int) -> list[str]:
        """Names in the record of a sample that look like labels but are not used."""
        return []

    def known_label(self, index: int) -> KnownLabel | None:
        """Return the teacher's energy and forces of a sample if they are known."""
        return None

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
        self.options = inner.options
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

    def label_names(self, index: int) -> list[str]:
        """Names in the record of a sample that look like labels but are not used."""
        return self._inner.label_names(index)

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

    def only(self, chosen: Sequence[int]) -> "Listing":
        """The samples at positions ``chosen``, in that order."""
        rows = np.asarray(chosen, np.intp)
        places = {name: column[rows] for name, column in self.places.items()}
        return Listing([self.ids[i] for i in chosen], self.n_atoms[rows], places)


class IndexedDataset(Dataset):
    """A dataset whose samples are listed, in one pass over its files, to be found.

    Made without a listing; `list_samples` or an earlier pass gives it to `use`. With a
    listing in use, the sample at an index must follow from ``places`` alone.
    """

    # Name in `splits.NAME.format`, and endings by which files tell their format.
    format: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()
    # Dtypes of the places that a listing has.
    columns: ClassVar[dict[str, str]] = {}

    def __init__(
        self, paths: Sequence[Path], selection: Selection, options: ReadOptions
    ) -> None:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        self.path = f"{paths[0]}{more}"
        self.options = options
        # Frames that are chosen by their values are counted when they are known.
        self._selection = Selection() if options.where else selection
        self._among_matching = selection
        self._ids: list[str] = []
        self._n_atoms: npt.NDArray[np.int32] = np.zeros(0, np.int32)

    @abstractmethod
    def files(self) -> list[Path]:
        """All files with samples; what a listing says holds until one changes."""

    @abstractmethod
    def list_frames(self, run: OrderedMap = map) -> Listing:
        """Read the files once, in the processes of ``run``; all that `_selection` has.

        Raises
        ------
        DataError
            A file is damaged or of another format.
        """

    @abstractmethod
    def where_values(self, index: int) -> tuple[Any, ...]:
        """A sample's own values under the keys of ``where``."""

    def list_samples(self, run: OrderedMap = map) -> Listing:
        """Samples that the split chooses, by one pass over the files.

        ``offset``, ``every`` and ``limit`` count the frames that meet ``where``.

        Raises
        ------
        DataError
            A file is damaged or of another format, or ``where`` chooses nothing.
        """
        listing = self.list_frames(run)
        where = self.options.where
        if not where or not listing.ids:
            return listing
        self.use(listing)
        rows: list[tuple[Any, ...]] = []
        pieces = split_pieces(range(len(listing.ids)), _PIECE)
        for part in run(partial(_values, self), pieces):
            rows += part
        chosen = select_matching(self.path, where, rows)
        return listing.only([chosen[i] for i in self._among_matching.of(len(chosen))])

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


class RecordDataset(IndexedDataset):
    """An indexed dataset whose samples are made of records, one by one."""

    @abstractmethod
    def record(self, index: int) -> Record:
        """What the source has of the sample at ``index``, unchecked.

        Raises
        ------
        DataError
            It cannot be read.
        """

    @abstractmethod
    def place(self, index: int) -> str:
        """File and sample at ``index``, as they begin the sentence of an error."""

    def relist(self, index: int) -> None:
        """Raise DataError again if the sample could not be listed."""

    def __getitem__(self, index: int) -> Sample:
        if not self._n_atoms[index]:
            self.relist(index)
        return record_sample(
            self._ids[index], self.record(index), self.options, self.place(index)
        )

    def where_values(self, index: int) -> tuple[Any, ...]:
        """A sample's own values under the keys of ``where``.

        One that cannot be read, but may be left out, meets them all and is named.
        """
        where = self.options.where
        try:
            return look_up(self.record(index).properties, where)
        except DataError:
            if not self.options.keep_bad:
                raise
            return tuple(one for _, (one, *_) in where)

    def label_names(self, index: int) -> list[str]:
        """Names in the record of a sample that look like labels but are not used."""
        return label_like(self.record(index), self.options)


def _values(dataset: IndexedDataset, indices: range) -> list[tuple[Any, ...]]:
    return [dataset.where_values(index) for index in indices]


def split_pieces(items: Any, size: int) -> list[Any]:
    """Runs of ``size`` consecutive items of a sequence or an array."""
    return [items[first : first + size] for first in range(0, len(items), size)]
