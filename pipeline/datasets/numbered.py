"""Datasets whose frames are counted within each file, and files that are kept open."""

import os
import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from pipeline.datasets.base import Listing, RecordDataset, Selection, split_pieces
from pipeline.datasets.constraints import warn_of_constraints
from pipeline.datasets.labels import ReadOptions, Record
from pipeline.datasets.paths import find_files, refuse_twins
from pipeline.errors import DataError
from pipeline.parallel.ordered_map import OrderedMap

Opened = TypeVar("Opened")
# Frames that one process lists at a time.
PIECE = 4096


@dataclass
class Found:
    """What a look at some frames found: own ids or None, atoms, lost constraints."""

    ids: list[str | None] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    lost: list[tuple[str, ...]] = field(default_factory=list)


class OpenFiles(Generic[Opened]):
    """The files that a process has opened last, by what they hold.

    Readers that cannot be shared are opened by each thread.
    """

    def __init__(
        self, opener: Callable[[Path], Opened], *, shared: bool, limit: int = 32
    ) -> None:
        self._opener = opener
        self._shared = shared
        self._limit = limit
        self._files: OrderedDict[tuple[Any, ...], Opened] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, path: Path) -> Opened:
        """The file at ``path``, opened again if it has changed."""
        try:
            status = path.stat()
        except OSError:
            raise DataError(f"{path} does not exist.") from None
        owner = 0 if self._shared else threading.get_ident()
        key = (os.getpid(), owner, path, status.st_mtime_ns, status.st_size)
        with self._lock:
            if key not in self._files:
                self._files[key] = self._opener(path)
            self._files.move_to_end(key)
            while len(self._files) > self._limit:
                self._files.popitem(last=False)
            return self._files[key]


class NumberedDataset(RecordDataset):
    """Frames of files, each found by its number in its file.

    A frame without an id of its own has its number in the file as id, after the name
    of the file if there are several.
    """

    columns: ClassVar[dict[str, str]] = {"file": "int32", "frame": "int64"}

    def __init__(
        self, paths: Sequence[Path], selection: Selection, options: ReadOptions
    ) -> None:
        super().__init__(paths, selection, options)
        self._files = find_files(paths, self.suffixes, packed=())
        for file in self._files:
            if not file.is_file():
                raise DataError(f"{file} does not exist.")
        refuse_twins(self._files, self.suffixes)

    @staticmethod
    @abstractmethod
    def count(file: Path) -> int:
        """Return the number of frames in a file."""

    @abstractmethod
    def look(self, file: Path, frames: range) -> Found:
        """Return ids, sizes and lost constraints of some frames of a file."""

    @abstractmethod
    def read(self, file: Path, frame: int) -> Record:
        """Return what a file has of one frame."""

    def files(self) -> list[Path]:
        """All files with samples."""
        return self._files

    def list_frames(self, run: OrderedMap = map) -> Listing:
        """Ids, atom counts and numbers of frames."""
        counts = [self.count(file) for file in self._files]
        chosen = self._selection.of(sum(counts))
        pieces = []
        first = 0
        for which, count in enumerate(counts):
            mine = _intersect(chosen, first, count)
            pieces += [(which, part) for part in split_pieces(mine, PIECE)]
            first += count
        ids: list[str] = []
        sizes: list[int] = []
        lost: list[tuple[str, ...]] = []
        for found in run(self._look, pieces):
            ids += [str(own) for own in found.ids]
            sizes += found.sizes
            lost += found.lost
        warn_of_constraints(self.path, lost)
        owners = [np.full(len(part), which, np.int32) for which, part in pieces]
        frames = [np.array(part, np.int64) for _, part in pieces]
        places = {
            "file": np.concatenate([np.zeros(0, np.int32), *owners]),
            "frame": np.concatenate([np.zeros(0, np.int64), *frames]),
        }
        return Listing(ids, np.array(sizes, np.int32), places)

    def use(self, listing: Listing) -> None:
        """Take ``listing`` for that of this dataset."""
        super().use(listing)
        self._places = listing.places

    def record(self, index: int) -> Record:
        """The frame as it is in the file."""
        return self.read(*self._place(index))

    def place(self, index: int) -> str:
        """File and number of the frame."""
        file, frame = self._place(index)
        return f"{file}: sample {frame}"

    def _place(self, index: int) -> tuple[Path, int]:
        file = self._files[int(self._places["file"][index])]
        return file, int(self._places["frame"][index])

    def _look(self, piece: tuple[int, range]) -> Found:
        """`look`, with an id for every frame."""
        which, frames = piece
        try:
            found = self.look(self._files[which], frames)
        except DataError:
            if not self.options.keep_bad:
                raise
            found = self._one_by_one(self._files[which], frames)
        alone = len(self._files) == 1
        before = "" if alone else f"{self._files[which].stem}_"
        bare = [f"{before}{frame}" for frame in frames]
        pairs = zip(found.ids, bare, strict=True)
        found.ids = [other if own is None else own for own, other in pairs]
        return found

    def _one_by_one(self, file: Path, frames: range) -> Found:
        """`look` at each frame, without what cannot be listed of one."""
        found = Found()
        for frame in frames:
            try:
                one = self.look(file, range(frame, frame + 1))
            except DataError:
                one = Found([None], [0], [()])
            found.ids += one.ids
            found.sizes += one.sizes
            found.lost += one.lost
        return found

    def relist(self, index: int) -> None:
        """Raise DataError again if the frame could not be listed."""
        file, frame = self._place(index)
        self.look(file, range(frame, frame + 1))


def _intersect(chosen: range, first: int, count: int) -> range:
    """Numbers among ``count`` frames that are chosen, if the first is ``first``."""
    begin = _chosen_before(chosen, first)
    end = _chosen_before(chosen, first + count)
    mine = chosen[begin:end]
    return range(mine.start - first, mine.stop - first, mine.step)


def _chosen_before(chosen: range, number: int) -> int:
    return len(range(chosen.start, min(number, chosen.stop), chosen.step))
