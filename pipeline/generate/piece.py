"""Copies of a few samples: made together, screened, and kept in one file."""

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError
from pipeline.files.atomic import write_atomically
from pipeline.generate.dynamics import Dynamics
from pipeline.generate.method import Copy, Method, free_atoms
from pipeline.generate.normal_modes import NormalModes
from pipeline.generate.randomness import Floats, round_to_grid
from pipeline.generate.rattle import Rattle, RattleRelax
from pipeline.generate.screen import REASONS, Screen
from pipeline.generate.teacher import CountedTeacher, Label
from pipeline.spec.generate_spec import GenerateSpec
from pipeline.structure import Sample, Structure
from pipeline.teachers.runner import TeacherRunner

METHODS: dict[str, type[Method]] = {
    "rattle": Rattle,
    "normal_modes": NormalModes,
    "md": Dynamics,
    "rattle_relax": RattleRelax,
}
# Draws of a copy; if all are refused, the copy is a bad sample.
ATTEMPTS = 10


@dataclass(frozen=True, eq=False)
class Piece:
    """All copies of some samples, one sample after the other; m copies together.

    ``positions`` (ΣN, 3) and ``cells`` (m, 3, 3) in Å, ``energies`` (m,) in eV and
    ``forces`` (ΣN, 3) float32 in eV/Å by the teacher, ``reasons`` (m,) why a copy was
    refused in all draws, empty for the others. ``counts`` has teacher passes and
    refused draws by reason.
    """

    positions: Floats
    cells: Floats
    energies: Floats
    forces: npt.NDArray[np.float32]
    reasons: npt.NDArray[np.str_]
    counts: dict[str, int]

    def write(self, path: Path, key: str) -> None:
        """Write the piece to ``path`` with the ``key`` of what it was made from."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            allow_pickle=False,
            made_from=np.array(key),
            positions=self.positions,
            cells=self.cells,
            energies=self.energies,
            forces=self.forces,
            reasons=self.reasons,
            counts=np.array(json.dumps(self.counts)),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getbuffer())

    @classmethod
    def read(cls, path: Path, key: str) -> "Piece | None":
        """Read the piece; None if it is missing, damaged or made from something else.

        Zip archives carry a checksum of each array.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                if str(archive["made_from"]) != key:
                    return None
                names = ("positions", "cells", "energies", "forces", "reasons")
                arrays: dict[str, Any] = {name: archive[name] for name in names}
                counts = json.loads(str(archive["counts"]))
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
            return None
        return cls(**arrays, counts=counts)


def copy_ids(sample_ids: Sequence[str], spec: GenerateSpec) -> list[str]:
    """Return the ids of all copies of the samples, such as ``t7#m3``."""
    letter = METHODS[spec.method].letter
    return [f"{name}#{letter}{k}" for name in sample_ids for k in range(spec.copies)]


def make_piece(
    parents: Sequence[Sample],
    spec: GenerateSpec,
    runner: TeacherRunner,
    closest: float | None,
) -> Piece:
    """Make ``spec.copies`` copies of each of ``parents``, labelled by the teacher.

    Parameters
    ----------
    closest
        Minimum distance of two atoms, as a share of the sum of their covalent radii.

    Raises
    ------
    DataError
        A sample has no free atom, or a strain is asked for and it is not periodic.
    """
    for parent in parents:
        _check_parent(parent, spec)
    teacher = CountedTeacher(runner)
    method = METHODS[spec.method](spec, parents, teacher)
    names = copy_ids([parent.sample_id for parent in parents], spec)
    origins = teacher.label(parents)
    copies = [Copy(p, k) for p in range(len(parents)) for k in range(spec.copies)]
    rows = {copy: row for row, copy in enumerate(copies)}
    drawing = _Drawing(method, Screen(spec, closest), names, rows, origins)
    pending = copies
    for attempt in range(ATTEMPTS):
        pending = drawing.draw(pending, attempt)
        if not pending:
            break
    return drawing.piece([rows[copy] for copy in pending])


class _Drawing:
    """Draws of the copies of some samples, and what was accepted so far."""

    def __init__(
        self,
        method: Method,
        screen: Screen,
        names: Sequence[str],
        rows: dict[Copy, int],
        origins: Sequence[Label],
    ) -> None:
        self._method = method
        self._screen = screen
        self._names = names
        self._rows = rows
        self._origins = origins
        self._found: dict[int, tuple[Structure, Label]] = {}
        self._reasons: dict[int, str] = {}
        self._counts = dict.fromkeys(REASONS, 0)

    def draw(self, copies: Sequence[Copy], attempt: int) -> list[Copy]:
        """Draw ``copies`` once; return those that were refused."""
        sensible: list[tuple[Copy, Sample]] = []
        refused: set[Copy] = set()
        proposed = self._method.propose(copies, attempt)
        for copy, structure in zip(copies, proposed, strict=True):
            strained = self._strain(copy, structure, attempt)
            sample = Sample.without_labels(self._names[self._rows[copy]], strained)
            reason = self._screen.refuse_positions(sample)
            if reason is None:
                sensible.append((copy, sample))
            else:
                refused.add(self._refuse(copy, reason))
        labels = self._method.teacher.label([sample for _, sample in sensible])
        for (copy, sample), label in zip(sensible, labels, strict=True):
            origin = self._origins[copy.parent]
            reason = self._screen.refuse_label(sample, label, origin)
            if reason is None:
                self._found[self._rows[copy]] = sample.structure, label
            else:
                refused.add(self._refuse(copy, reason))
        return [copy for copy in copies if copy in refused]

    def piece(self, missing: Sequence[int]) -> Piece:
        """Return all copies; those of the rows ``missing`` are as their samples are."""
        found = dict(self._found)
        for copy, row in self._rows.items():
            if row not in found:
                structure = self._method.parents[copy.parent].structure
                found[row] = structure, self._origins[copy.parent]
        kept = [found[row] for row in range(len(self._names))]
        reasons = ["" for _ in self._names]
        for row in missing:
            reasons[row] = self._reasons[row]
        return Piece(
            np.concatenate([structure.positions for structure, _ in kept]),
            np.stack([structure.cell for structure, _ in kept]),
            np.array([label.energy for _, label in kept]),
            np.concatenate([label.forces for _, label in kept]),
            np.array(reasons, np.str_),
            {"passes": self._method.teacher.passes, **self._counts},
        )

    def _refuse(self, copy: Copy, reason: tuple[str, str]) -> Copy:
        kind, words = reason
        self._counts[kind] += 1
        self._reasons[self._rows[copy]] = words
        return copy

    def _strain(self, copy: Copy, structure: Structure, attempt: int) -> Structure:
        """Return ``structure`` under a random symmetric strain, if one is asked for."""
        sigma = self._method.spec.cell_sigma
        if sigma is None:
            return structure
        random = self._method.generator(copy, attempt, "strain")
        drawn = sigma * random.standard_normal((3, 3))
        strain = np.eye(3) + (drawn + drawn.T) / 2
        return replace(
            structure,
            positions=round_to_grid(structure.positions @ strain),
            cell=round_to_grid(structure.cell @ strain),
        )


def _check_parent(parent: Sample, spec: GenerateSpec) -> None:
    structure = parent.structure
    if not len(free_atoms(structure)):
        raise DataError(
            f"Sample {parent.sample_id!r} has fixed atoms only, so its copies would be "
            "alike; leave it out of the split with generate:."
        )
    if spec.cell_sigma is not None and not structure.pbc.all():
        raise DataError(
            f"Sample {parent.sample_id!r} is not periodic in three directions, but "
            "generate.cell_sigma strains its cell; remove cell_sigma."
        )
