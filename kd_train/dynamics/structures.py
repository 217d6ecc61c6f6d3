"""Structures and trajectories from files, as ASE atoms."""

from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms

from pipeline.datasets import open_dataset
from pipeline.datasets.paths import PACKED
from pipeline.datasets.registry import format_of_suffix
from pipeline.datasets.samples import Fields, make_sample
from pipeline.errors import DataError
from pipeline.graphs.closeness import check_distances
from pipeline.structure import Sample, Structure


def read_start(path: Path, index: int, closest: float) -> Atoms:
    """Return frame ``index`` of ``path``; atoms that the file fixes stay fixed.

    ``closest`` is the minimum distance of two atoms, as a share of the sum of their
    covalent radii.

    Raises
    ------
    DataError
        The file is missing or damaged, has no such frame, or atoms are too close.
    """
    sample = _read_frame(path, index)
    try:
        check_distances(sample, closest, "or name another structure")
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return to_atoms(sample.structure)


def read_trajectory(path: Path) -> list[Structure]:
    """Return all frames of ``path``.

    Raises
    ------
    DataError
        The file is missing or damaged.
    """
    _require_file(path)
    format = _format(path)
    if format is None:
        return [_checked(a, path, k) for k, a in enumerate(_read_by_ase(path, ":"))]
    dataset = open_dataset(format, str(path))
    return [dataset[k].structure for k in range(len(dataset))]


def to_structure(atoms: Atoms) -> Structure:
    """Return ``atoms`` as one structure of this project; tags are left out."""
    fields = Fields(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
    return make_sample("", fields, "The structure").structure


def to_atoms(structure: Structure) -> Atoms:
    """Return ``structure`` as ASE atoms without a calculator."""
    atoms = Atoms(
        structure.atomic_numbers,
        structure.positions,
        cell=structure.cell,
        pbc=structure.pbc,
        tags=structure.tags,
    )
    if structure.fixed.any():
        atoms.set_constraint(FixAtoms(mask=structure.fixed))
    return atoms


def _read_frame(path: Path, index: int) -> Sample:
    _require_file(path)
    format = _format(path)
    if format is None:
        atoms = _read_by_ase(path, index)[0]
        return Sample.without_labels(path.name, _checked(atoms, path, index))
    return open_dataset(format, str(path), offset=index, limit=1)[0]


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file.")


def _format(path: Path) -> str | None:
    """Return the format of our reader of ``path``; None if ASE has to read it."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in PACKED]
    return format_of_suffix(suffixes[-1]) if suffixes else None


def _read_by_ase(path: Path, index: int | str) -> list[Atoms]:
    try:
        found = ase.io.read(path, index=index)
    # ASE's many readers raise what they like about files of other formats.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path} cannot be read by ASE ({reason:.200}); name an extended XYZ file "
            "and a frame that it has."
        ) from None
    return found if isinstance(found, list) else [found]


def _checked(atoms: Atoms, path: Path, index: int) -> Structure:
    fixed = np.zeros(len(atoms), bool)
    for constraint in atoms.constraints:
        if not isinstance(constraint, FixAtoms):
            raise DataError(
                f"{path}: frame {index} has the constraint "
                f"{type(constraint).__name__}, and only FixAtoms is supported."
            )
        fixed[constraint.get_indices()] = True
    fields = Fields(
        atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, fixed=fixed
    )
    return make_sample("", fields, f"{path}: frame {index}").structure
