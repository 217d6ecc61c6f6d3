"""OC20's raw chunks: frames in N.extxyz, ids and reference energies in N.txt."""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from pipeline.datasets.base import Listing, RecordDataset, Selection
from pipeline.datasets.constraints import warn_of_constraints
from pipeline.datasets.frame_records import FrameText
from pipeline.datasets.frames import (
    SUFFIXES,
    UNPACKED_BYTES,
    Span,
    TextCache,
    frame_spans,
    read_unpacked,
)
from pipeline.datasets.labels import ReadOptions, Record
from pipeline.datasets.oc20_systems import find_systems, system_reference
from pipeline.datasets.packing import is_packed
from pipeline.datasets.paths import PACKED, find_files
from pipeline.datasets.samples import pair_id
from pipeline.errors import DataError
from pipeline.parallel.ordered_map import OrderedMap
from pipeline.structure import Sample

log = logging.getLogger("pipeline.datasets")
Energy = Literal["adsorption", "total"]
_texts = TextCache()
# Columns that may be constraints; OC20's own frames have move_mask of one flag.
_MASKED = re.compile(
    rb"(?!move_mask:l:1\b)(fix|froz|freez|free_?a|constr|select|mov|mobil)", re.I
)


@dataclass(frozen=True)
class Chunk:
    """One file of frames, and what lies beside it.

    ``lines`` has a line for each frame, ``systems`` one for each file of frames. With
    the latter alone, ``reference`` is the energy in eV that it has for this file.
    """

    frames: Path
    lines: Path | None
    systems: Path | None = None
    reference: float | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """What the text file says of one frame; the energy in eV."""

    sample_id: str
    reference: float


@dataclass(frozen=True, eq=False)
class _Frames:
    """The m frames of a chunk: where they are and what is said of them.

    ``spans`` (m, 3) are begin and end in the unpacked text and the atoms; an id is None
    where only the running number is left; ``references`` (m,) in eV; ``packed`` bytes
    had to be unpacked. ``lost`` are names of constraints that are not kept.
    """

    spans: npt.NDArray[np.int64]
    ids: list[str | None]
    references: npt.NDArray[np.float64]
    packed: int
    lost: list[tuple[str, ...]]


class Oc20RawDataset(RecordDataset):
    """Frames of raw chunks, parsed when they are asked for.

    Energies are adsorption energies, the frames' total energies less the references of
    the text files, or with ``energy="total"`` the totals; without text files there are
    only totals. Ids: ``{sid}_{fid}`` of the text file, else of the frame's header. Else
    the id is the running number over all files, or with ``system.txt`` the name and
    the number of the frame in its own file.
    """

    format: ClassVar[str] = "oc20_raw"
    # The frames end in .extxyz, too, so no ending tells this format.
    suffixes: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[dict[str, str]] = {
        "chunk": "int32",
        "start": "int64",
        "stop": "int64",
        "number": "int32",
        "reference": "float64",
    }

    def __init__(
        self,
        paths: Sequence[Path],
        selection: Selection,
        options: ReadOptions,
        energy: Energy | None = None,
    ) -> None:
        super().__init__(paths, selection, options)
        self._chunks = _chunks(paths)
        self._subtract = _subtracts(self._chunks, energy)

    def files(self) -> list[Path]:
        """All files with samples, and those with lines."""
        found = [
            file
            for chunk in self._chunks
            for file in (chunk.frames, chunk.lines, chunk.systems)
            if file is not None
        ]
        return list(dict.fromkeys(found))

    def list_frames(self, run: OrderedMap = map) -> Listing:
        """Where all frames are, and their ids and references; parses none."""
        chosen = self._selection.of()
        ids: list[str] = []
        places: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in self.columns}
        sizes = []
        lost: list[tuple[str, ...]] = []
        first = packed = 0
        for which, found in enumerate(run(_scan_chunk, self._chunks)):
            mine = [i for i in range(len(found.ids)) if first + i in chosen]
            ids += [found.ids[i] or str(first + i) for i in mine]
            start, stop, n_atoms = found.spans[mine].T
            sizes.append(n_atoms.astype(np.int32))
            places["chunk"].append(np.full(len(mine), which, np.int32))
            places["start"].append(start)
            places["stop"].append(stop)
            places["number"].append(np.array(mine, np.int32))
            places["reference"].append(found.references[mine])
            packed += found.packed
            lost += [found.lost[i] for i in mine]
            first += len(found.ids)
            if first >= chosen.stop:
                break
        self._advise(packed)
        warn_of_constraints(self.path, lost)
        columns = {name: np.concatenate(parts) for name, parts in places.items()}
        return Listing(ids, np.concatenate(sizes), columns)

    def use(self, listing: Listing) -> None:
        """Take ``listing`` for that of this dataset."""
        super().use(listing)
        self._places = listing.places

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        reference = self._places["reference"][index].item() if self._subtract else 0.0
        return replace(sample, energy=sample.energy - reference)

    def record(self, index: int) -> Record:
        """The frame as it is in the file; its energy is the total one."""
        place = {name: column[index].item() for name, column in self._places.items()}
        path = self._chunks[place["chunk"]].frames
        text = _texts.piece(path, place["start"], place["stop"])
        return FrameText.of(path, text, place["number"]).record()

    def place(self, index: int) -> str:
        """File and id of the frame."""
        chunk = self._chunks[int(self._places["chunk"][index])]
        return f"{chunk.frames}: sample {self._ids[index]!r}"

    def _advise(self, packed: int) -> None:
        if packed > UNPACKED_BYTES:
            log.warning(
                "%s holds %.1f GB of compressed text, which reads in random order "
                "decompress many times; decompress its files first",
                self.path,
                packed / 1e9,
            )


def _chunks(paths: Sequence[Path]) -> list[Chunk]:
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist.")
    return [_chunk(file) for file in find_files(paths, SUFFIXES)]


def _chunk(file: Path) -> Chunk:
    """The file with its lines, or else with the reference that its folder has of it."""
    stem = _stem(file)
    for packed in ("", *PACKED):
        text = file.with_name(f"{stem}.txt{packed}")
        if text.is_file():
            return Chunk(file, text)
    systems = find_systems(file)
    if systems is None:
        return Chunk(file, None)
    return Chunk(file, None, systems, system_reference(systems, stem))


def _stem(file: Path) -> str:
    name = file.name
    for ending in (*PACKED, *SUFFIXES):
        name = name.removesuffix(ending)
    return name


def _subtracts(chunks: list[Chunk], energy: Energy | None) -> bool:
    """Whether references are subtracted; refuses what the files do not allow."""
    if energy == "total":
        return False
    bare = [c for c in chunks if c.lines is None and c.reference is None]
    listed = any(c.systems is not None for c in bare)
    if bare and (energy == "adsorption" or len(bare) < len(chunks) or listed):
        first = bare[0]
        lack = "has no .txt file with reference energies next to it"
        if first.systems is not None:
            lack = f"has no reference energy in {first.systems.name}"
        raise DataError(
            f"{first.frames} {lack}, so its adsorption energies are unknown; fetch "
            "the file or set energy: total."
        )
    return not bare


def _lines(chunk: Chunk, n_frames: int) -> list[Line]:
    """The chunk's lines, one for each frame, or none at all."""
    if chunk.lines is None:
        return []
    texts = read_unpacked(chunk.lines).rstrip().splitlines()
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


def _scan_chunk(chunk: Chunk) -> _Frames:
    text = read_unpacked(chunk.frames)
    spans = frame_spans(chunk.frames, text)
    lines = _lines(chunk, len(spans))
    ids: list[str | None]
    if lines:
        ids = [line.sample_id for line in lines]
    else:
        ids = [_read_id(chunk.frames, text, *pair) for pair in enumerate(spans)]
    if chunk.reference is not None:
        # The file is named after its system, and has its frames in their order.
        ids = [own or pair_id(_stem(chunk.frames), i) for i, own in enumerate(ids)]
    bare = chunk.reference or 0.0
    return _Frames(
        np.array([(s.start, s.stop, s.n_atoms) for s in spans], np.int64).reshape(
            -1, 3
        ),
        ids,
        np.array([line.reference for line in lines] or [bare] * len(spans)),
        len(text) if is_packed(chunk.frames) else 0,
        [_lost(chunk.frames, text, *pair) for pair in enumerate(spans)],
    )


def _read_id(path: Path, text: bytes, number: int, span: Span) -> str | None:
    """What the frame's own header says, where there is no text file."""
    try:
        return FrameText.of(path, text[span.start : span.stop], number).sample_id
    except DataError:
        # Raised again when the sample is asked for, which may be left out then.
        return None


def _lost(path: Path, text: bytes, number: int, span: Span) -> tuple[str, ...]:
    """Names of the frame's constraints that are not kept; parses frames with masks."""
    frame = text[span.start : span.stop]
    if not _MASKED.search(frame.split(b"\n", 2)[1]):
        return ()
    try:
        return FrameText.of(path, frame, number).record().lost
    except DataError:
        # A bad frame is refused, or skipped and named, when its sample is read.
        return ()
