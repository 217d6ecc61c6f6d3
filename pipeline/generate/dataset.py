"""The dataset of generated structures: samples of another dataset, and their copies."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.datasets.base import Dataset, DerivedDataset, KnownLabel
from pipeline.errors import DataError
from pipeline.generate.piece import ATTEMPTS, Piece, copy_ids
from pipeline.spec.generate_spec import GenerateSpec
from pipeline.structure import Sample

# Samples whose copies are made together. It decides which structures share a teacher
# pass, and so the last bits of their numbers: a change makes other structures.
PARENTS_PER_PIECE = 16


class GeneratedDataset(DerivedDataset):
    """Copies of every sample of ``parents``, as the files of ``folder`` hold them.

    Copy k of sample ``x`` has an id such as ``x#m3``. ``key`` identifies what the
    copies are made from: samples, settings and teacher. ``closest`` is the minimum
    distance of two atoms, as a share of the sum of their covalent radii.
    """

    def __init__(
        self,
        parents: Dataset,
        spec: GenerateSpec,
        folder: Path,
        key: str,
        closest: float | None,
    ) -> None:
        super().__init__(parents)
        self.spec = spec
        self.folder = folder
        self.key = key
        self.closest = closest
        self._ids = copy_ids(parents.sample_ids, spec)
        self._n_atoms = np.repeat(parents.n_atoms, spec.copies)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Sample:
        """Return one copy, without labels.

        Raises
        ------
        DataError
            The copy was refused in all draws, or was not made yet.
        """
        number = range(len(self))[index]
        piece, row, rows = self._find(number)
        if piece.reasons[row]:
            raise DataError(
                f"Sample {self._ids[number]!r} was refused in all {ATTEMPTS} draws: "
                f"{piece.reasons[row]}; lower generate.temperature or generate.sigma, "
                "raise generate.max_force or generate.max_energy_rise, or set "
                "on_bad_sample: skip."
            )
        parent = self._inner[number // self.spec.copies].structure
        moved = replace(parent, positions=piece.positions[rows], cell=piece.cells[row])
        return Sample.without_labels(self._ids[number], moved)

    def known_label(self, index: int) -> KnownLabel | None:
        """Return the teacher's energy and forces of a copy, which screening needed."""
        piece, row, rows = self._find(range(len(self))[index])
        return float(piece.energies[row]), piece.forces[rows]

    @property
    def sample_ids(self) -> Sequence[str]:
        """Ids, all copies of a sample one after the other."""
        return self._ids

    @property
    def n_atoms(self) -> npt.NDArray[np.int32]:
        """Atoms of every copy, (n,) int32."""
        return self._n_atoms

    @property
    def keeps_samples(self) -> bool:
        """Whether the samples lie in memory: never, since pieces are files."""
        return False

    def label_names(self, index: int) -> list[str]:
        """Return no names, because no label is missing."""
        return []

    @property
    def parents(self) -> Dataset:
        """The samples that the copies are made from."""
        return self._inner

    @property
    def n_pieces(self) -> int:
        """Number of pieces."""
        return -(-len(self._inner) // PARENTS_PER_PIECE)

    def piece_parents(self, piece: int) -> range:
        """Return the samples whose copies ``piece`` holds."""
        first = piece * PARENTS_PER_PIECE
        return range(first, min(first + PARENTS_PER_PIECE, len(self._inner)))

    def parents_of(self, piece: int) -> list[Sample]:
        """Read the samples whose copies ``piece`` holds."""
        return [self._inner[index] for index in self.piece_parents(piece)]

    def piece_file(self, piece: int) -> Path:
        """Return the file of ``piece``."""
        return self.folder / f"{piece:06d}.npz"

    def read_piece(self, piece: int) -> Piece | None:
        """Return ``piece``, or None if it was not made, or not from the same input."""
        return Piece.read(self.piece_file(piece), self.key)

    def _find(self, number: int) -> tuple[Piece, int, slice]:
        """Return the piece of a copy, its row there and the rows of its atoms."""
        parent, copy = divmod(number, self.spec.copies)
        which = parent // PARENTS_PER_PIECE
        piece = _cached_piece(self, which)
        first = self.piece_parents(which).start
        begin = first * self.spec.copies
        before = int(self._n_atoms[begin:number].sum())
        size = int(self._n_atoms[number])
        row = (parent - first) * self.spec.copies + copy
        return piece, row, slice(before, before + size)


@lru_cache(maxsize=8)
def _cached_piece(dataset: GeneratedDataset, piece: int) -> Piece:
    found = dataset.read_piece(piece)
    if found is None:
        raise DataError(
            f"{dataset.piece_file(piece)} is missing or damaged, or was made from "
            "other data; make the structures again with `kd-cache plan SPEC`."
        )
    return found
