"""Extended XYZ files (plain, .gz, .xz), as written by ASE, COLL and BOTNet sets."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms

from pipeline.datasets.base import IndexedDataset, Listing, Selection, in_pieces
from pipeline.datasets.frames import (
    SUFFIXES,
    atoms_fields,
    files_in,
    frame_spans,
    header_id,
    parse_frame,
    unpacked_text,
)
from pipeline.datasets.samples import checked_sample
from pipeline.execution.passes import Run
from pipeline.structure import Sample

log = logging.getLogger("pipeline.datasets")
# Frames that one process parses at a time.
PIECE = 512


@dataclass(frozen=True)
class _Piece:
    """Text of some frames of a file, and their running numbers over all files."""

    file: Path
    numbers: list[int]
    frames: list[bytes]


class ExtxyzDataset(IndexedDataset):
    """Frames of one extended-XYZ file or a folder of them, kept in memory.

    Ids: ``sample_id`` of the frame's header, else ``{sid}_{fid}``, else the running
    number over all files. Per-atom columns ``tags`` and ``fixed`` or ``move_mask`` are
    honoured. Labels are ``energy`` and ``forces`` only; other names are not guessed at.
    """

    def __init__(self, path: str, selection: Selection) -> None:
        super().__init__(path)
        self._chosen = selection.of()
        self._samples: list[Sample] = []

    def files(self) -> list[Path]:
        """All files with samples."""
        return files_in(Path(self.path), SUFFIXES)

    @property
    def keeps_samples(self) -> bool:
        """Frames are parsed once, when they are listed."""
        return True

    def list_samples(self, run: Run = map) -> Listing:
        """Parse the chosen frames and keep them."""
        for samples in run(_parse, self._pieces()):
            self._samples += samples
        ids = [sample.sample_id for sample in self._samples]
        sizes = [len(sample.structure) for sample in self._samples]
        return Listing(ids, np.array(sizes, np.int32))

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]

    def _pieces(self) -> Iterator[_Piece]:
        """The chosen frames, some of one file at a time."""
        number = 0
        first = True
        for file in self.files():
            if number >= self._chosen.stop:
                break
            text = unpacked_text(file)
            spans = frame_spans(file, text)
            chosen = [i for i in range(len(spans)) if number + i in self._chosen]
            for part in in_pieces(chosen, PIECE):
                frames = [text[spans[i].start : spans[i].stop] for i in part]
                if first:
                    atoms, _ = parse_frame(file, frames[0], number + part[0])
                    warn_of_other_labels(file, atoms)
                    first = False
                yield _Piece(file, [number + i for i in part], frames)
            number += len(spans)


def _parse(piece: _Piece) -> list[Sample]:
    return [
        _sample(piece.file, frame, number)
        for frame, number in zip(piece.frames, piece.numbers, strict=True)
    ]


def _sample(path: Path, frame: bytes, number: int) -> Sample:
    atoms, header = parse_frame(path, frame, number)
    sample_id = header_id(header) or str(number)
    return checked_sample(
        sample_id, atoms_fields(atoms), f"{path}: sample {sample_id!r}"
    )


def warn_of_other_labels(path: Path, atoms: Atoms) -> None:
    """Log which names look like labels where the known ones are absent."""
    results = atoms.calc.results if atoms.calc is not None else {}
    names = sorted({*atoms.info, *atoms.arrays, *results})
    for label, stem in (("energy", "energ"), ("forces", "forc")):
        others = [n for n in names if stem in n.lower() and n != label]
        if label not in results and others:
            log.warning(
                "%s has no %r but %s; rename the one that is meant, or samples stay "
                "without labels",
                path,
                label,
                ", ".join(repr(name) for name in others),
            )
