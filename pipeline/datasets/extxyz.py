"""Extended XYZ files (plain, .gz, .xz), as written by ASE, COLL and BOTNet sets."""

import logging
from pathlib import Path

import numpy as np
from ase import Atoms

from pipeline.datasets.base import IndexedDataset, Selection
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
from pipeline.structure import Sample

log = logging.getLogger("pipeline.datasets")


class ExtxyzDataset(IndexedDataset):
    """Frames of one extended-XYZ file or a folder of them, kept in memory.

    Ids: ``sample_id`` of the frame's header, else ``{sid}_{fid}``, else the running
    number over all files. Per-atom columns ``tags`` and ``fixed`` or ``move_mask`` are
    honoured. Labels are ``energy`` and ``forces`` only; other names are not guessed at.
    """

    def __init__(self, path: str, selection: Selection) -> None:
        super().__init__(path)
        self._samples: list[Sample] = []
        chosen = selection.of()
        number = 0
        for file in files_in(Path(path), SUFFIXES):
            if number >= chosen.stop:
                break
            text = unpacked_text(file)
            for span in frame_spans(file, text):
                if number in chosen:
                    frame = text[span.start : span.stop]
                    first = not self._samples
                    self._samples.append(_sample(file, frame, number, first))
                number += 1
        self._ids = [sample.sample_id for sample in self._samples]
        self._n_atoms = np.array([len(s.structure) for s in self._samples], np.int32)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


def _sample(path: Path, frame: bytes, number: int, first: bool) -> Sample:
    atoms, header = parse_frame(path, frame, number)
    sample_id = header_id(header) or str(number)
    if first:
        warn_of_other_labels(path, atoms)
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
