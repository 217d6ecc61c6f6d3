"""OC20's raw chunks: frames in N.extxyz, ids and reference energies in N.txt."""

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.datasets.base import IndexedDataset, Selection
from pipeline.datasets.frames import (
    PACKED,
    SUFFIXES,
    UNPACKED_BYTES,
    Span,
    TextCache,
    atoms_fields,
    files_in,
    frame_spans,
    header_id,
    parse_frame,
    unpacked_text,
)
from pipeline.datasets.samples import checked_sample, pair_id
from pipeline.errors import DataError
from pipeline.structure import Sample

log = logging.getLogger("pipeline.datasets")
Energy = Literal["adsorption", "total"]
_texts = TextCache()


@dataclass(frozen=True)
class Chunk:
    """One file of frames, and the lines that belong to it if there are any."""

    frames: Path
    lines: Path | None


@dataclass(frozen=True, slots=True)
class Line:
    """What the text file says of one frame; the energy in eV."""

    sample_id: str
    reference: float


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a sample is, and what to subtract from its energy in eV."""

    chunk: int
    span: Span
    number: int
    reference: float


class Oc20RawDataset(IndexedDataset):
    """Frames of raw chunks, parsed when they are asked for.

    Energies are adsorption energies, the frames' total energies less the references of
    the text files, or with ``energy="total"`` the totals; without text files there are
    only totals. Ids: ``{sid}_{fid}`` of the text file, else of the frame's header, else
    the running number over all files.
    """

    def __init__(
        self,
        path: str,
        selection: Selection,
        energy: Energy | None = None,
    ) -> None:
        super().__init__(path)
        self._chunks = _chunks(Path(path))
        subtract = _subtracts(self._chunks, energy)
        self._entries: list[_Entry] = []
        chosen = selection.of()
        number = packed = 0
        for which, chunk in enumerate(self._chunks):
            if number >= chosen.stop:
                break
            text = unpacked_text(chunk.frames)
            packed += len(text) if chunk.frames.suffix in PACKED else 0
            spans = frame_spans(chunk.frames, text)
            lines = _lines(chunk, len(spans))
            for i, span in enumerate(spans):
                if number + i in chosen:
                    line = lines[i] if lines else _line_of(text, span, number + i)
                    reference = line.reference if subtract else 0.0
                    self._entries.append(_Entry(which, span, i, reference))
                    self._ids.append(line.sample_id)
            number += len(spans)
        self._n_atoms = np.array([e.span.n_atoms for e in self._entries], np.int32)
        self._advise(packed)

    def __getitem__(self, index: int) -> Sample:
        entry = self._entries[index]
        path = self._chunks[entry.chunk].frames
        text = _texts.piece(path, entry.span.start, entry.span.stop)
        atoms, _ = parse_frame(path, text, entry.number)
        sample_id = self._ids[index]
        where = f"{path}: sample {sample_id!r}"
        sample = checked_sample(sample_id, atoms_fields(atoms), where)
        return replace(sample, energy=sample.energy - entry.reference)

    def _advise(self, packed: int) -> None:
        if packed > UNPACKED_BYTES:
            log.warning(
                "%s holds %.1f GB of packed text, which is unpacked again and again as "
                "samples are read in random order; unpack its files first",
                self.path,
                packed / 1e9,
            )


def _chunks(path: Path) -> list[Chunk]:
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    return [Chunk(file, _lines_beside(file)) for file in files_in(path, SUFFIXES)]


def _lines_beside(file: Path) -> Path | None:
    stem = file.name
    for ending in (*PACKED, *SUFFIXES):
        stem = stem.removesuffix(ending)
    for packed in ("", *PACKED):
        text = file.with_name(f"{stem}.txt{packed}")
        if text.is_file():
            return text
    return None


def _subtracts(chunks: list[Chunk], energy: Energy | None) -> bool:
    """Whether references are subtracted; refuses what the files do not allow."""
    if energy == "total":
        return False
    bare = [chunk.frames for chunk in chunks if chunk.lines is None]
    if bare and (energy == "adsorption" or len(bare) < len(chunks)):
        raise DataError(
            f"{bare[0]} has no .txt file with reference energies beside it, so that "
            "its adsorption energies are unknown; fetch it or set energy: total."
        )
    return not bare


def _lines(chunk: Chunk, n_frames: int) -> list[Line]:
    """The chunk's lines, one for each frame, or none at all."""
    if chunk.lines is None:
        return []
    texts = unpacked_text(chunk.lines).rstrip().splitlines()
    if len(texts) != n_frames:
        raise DataError(
            f"{chunk.lines} has {len(texts)} lines, but {chunk.frames} has {n_frames} "
            "frames; fetch both again."
        )
    return [_line(chunk.lines, text, number) for number, text in enumerate(texts, 1)]


def _line(path: Path, text: bytes, number: int) -> Line:
    try:
        sid, fid, reference = text.decode().strip().split(",")
        line = Line(f"{pair_id(sid.strip(), fid.strip())}", float(reference))
    except ValueError:
        line = Line("", math.nan)
    if not math.isfinite(line.reference):
        raise DataError(
            f"{path}: line {number} is {text[:60]!r}, expected system,frame,energy."
        )
    return line


def _line_of(text: bytes, span: Span, number: int) -> Line:
    """What the frame's own header says, where there is no text file."""
    header = text[span.start : span.stop].split(b"\n", 2)[1].decode(errors="replace")
    return Line(header_id(header) or str(number), 0.0)
