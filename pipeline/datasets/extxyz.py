"""Extended XYZ files, plain or packed, as ASE, COLL, BOTNet and NEP sets have them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipeline.datasets.base import IndexedDataset, Listing, Selection, split_pieces
from pipeline.datasets.choosing import look_up, meets
from pipeline.datasets.constraints import warn_of_constraints
from pipeline.datasets.frame_records import FrameText
from pipeline.datasets.frames import (
    SUFFIXES,
    Span,
    frame_spans,
    read_unpacked,
)
from pipeline.datasets.labels import ReadOptions, label_like, record_sample
from pipeline.datasets.paths import find_files
from pipeline.errors import DataError
from pipeline.parallel.ordered_map import OrderedMap
from pipeline.structure import Sample

# Frames that one process parses at a time.
PIECE = 512


@dataclass(frozen=True)
class _Piece:
    """Text of some frames of a file, their atoms and numbers over all files."""

    file: Path
    numbers: list[int]
    n_atoms: list[int]
    frames: list[bytes]


@dataclass(frozen=True, slots=True)
class _Frame:
    """What is kept of a frame; ``error`` is why there is no sample.

    ``values`` are those under the keys of ``where``. A frame that does not meet it has
    neither sample nor error.
    """

    sample_id: str
    n_atoms: int
    values: tuple[Any, ...]
    label_names: tuple[str, ...] = ()
    sample: Sample | None = None
    error: str = ""
    lost: tuple[str, ...] = ()


class ExtxyzDataset(IndexedDataset):
    """Frames of extended-XYZ files or of a folder of them, kept in memory.

    Ids: ``sample_id`` of the frame's header, else ``{sid}_{fid}``, else the running
    number over all files. Per-atom columns ``tags`` and ``fixed`` or ``move_mask`` are
    honoured.
    """

    format: ClassVar[str] = "extxyz"
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES
    columns: ClassVar[dict[str, str]] = {"frame": "int64"}

    def __init__(
        self, paths: Sequence[Path], selection: Selection, options: ReadOptions
    ) -> None:
        super().__init__(paths, selection, options)
        self._paths = paths
        self._frames: list[_Frame] = []

    def files(self) -> list[Path]:
        """All files with samples."""
        return find_files(self._paths, SUFFIXES)

    @property
    def keeps_samples(self) -> bool:
        """Frames are parsed once, when they are listed."""
        return True

    def list_frames(self, run: OrderedMap = map) -> Listing:
        """Parse the chosen frames and keep them."""
        self._frames = []
        for frames in run(partial(_parse, self.options), self._pieces()):
            self._frames += frames
        warn_of_constraints(self.path, (frame.lost for frame in self._frames))
        return Listing(
            [frame.sample_id for frame in self._frames],
            np.array([frame.n_atoms for frame in self._frames], np.int32),
            {"frame": np.arange(len(self._frames))},
        )

    def use(self, listing: Listing) -> None:
        """Take ``listing`` for that of this dataset."""
        super().use(listing)
        self._places = listing.places["frame"].tolist()

    def __getitem__(self, index: int) -> Sample:
        frame = self._frames[self._places[index]]
        if frame.sample is None:
            raise DataError(frame.error)
        return frame.sample

    def where_values(self, index: int) -> tuple[Any, ...]:
        """A frame's own values under the keys of ``where``."""
        return self._frames[self._places[index]].values

    def label_names(self, index: int) -> list[str]:
        """Names in the frame that look like labels but are not used."""
        return list(self._frames[self._places[index]].label_names)

    def _pieces(self) -> Iterator[_Piece]:
        """The chosen frames, some of one file at a time."""
        chosen = self._selection.of()
        number = 0
        for file in self.files():
            if number >= chosen.stop:
                break
            text = read_unpacked(file)
            spans = frame_spans(file, text)
            mine = [i for i in range(len(spans)) if number + i in chosen]
            for part in split_pieces(mine, PIECE):
                yield _piece(file, text, number, part, spans)
            number += len(spans)


def _piece(
    file: Path, text: bytes, first: int, part: Sequence[int], spans: Sequence[Span]
) -> _Piece:
    return _Piece(
        file,
        [first + i for i in part],
        [spans[i].n_atoms for i in part],
        [text[spans[i].start : spans[i].stop] for i in part],
    )


def _parse(options: ReadOptions, piece: _Piece) -> list[_Frame]:
    rows = zip(piece.numbers, piece.n_atoms, piece.frames, strict=True)
    return [_frame(options, piece.file, *row) for row in rows]


def _frame(
    options: ReadOptions, file: Path, number: int, n_atoms: int, text: bytes
) -> _Frame:
    """One frame; one that cannot be read is kept with the reason, if that is asked."""
    sample_id = str(number)
    # A frame whose header is torn counts as meeting every condition, and is named.
    values: tuple[Any, ...] = tuple(one for _, (one, *_) in options.where)
    try:
        frame = FrameText.of(file, text, number)
        sample_id = frame.sample_id or sample_id
        if options.where:
            values = look_up(frame.header, options.where)
        record = frame.record()
        values = look_up(record.properties, options.where)
        if not meets(values, options.where):
            return _Frame(sample_id, n_atoms, values)
        place = f"{file}: sample {sample_id!r}"
        sample = record_sample(sample_id, record, options, place)
    except DataError as error:
        if not options.keep_bad:
            raise
        return _Frame(sample_id, n_atoms, values, error=str(error))
    names = tuple(label_like(record, options))
    return _Frame(sample_id, n_atoms, values, names, sample, lost=record.lost)
