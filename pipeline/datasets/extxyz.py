"""Extended XYZ files (plain, .gz, .xz), as written by ASE, COLL and BOTNet sets."""

import gzip
import io
import lzma
import re
from collections.abc import Sequence
from pathlib import Path

import ase.io
import numpy as np
import numpy.typing as npt
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian

from pipeline.datasets.base import Dataset
from pipeline.errors import DataError
from pipeline.structure import Sample, Structure

MOLECULE_TAG = 2
_SAMPLE_ID = re.compile(r"""(?:^|\s)sample_id=(?:"([^"]+)"|([^\s"]+))""")


class ExtxyzDataset(Dataset):
    """Frames of one extended-XYZ file, read once and kept in memory.

    Ids: ``sample_id`` of the frame's header, else ``{sid}_{fid}``, else the running
    number in the file. Per-atom columns ``tags`` and ``fixed`` or ``move_mask`` are
    honoured; without them tags are 2 and nothing is fixed.
    """

    def __init__(
        self, path: str, chosen: slice = slice(None), limit: int | None = None
    ) -> None:
        self.path = path
        frames, headers = _read_frames(Path(path))
        numbers = range(len(frames))[chosen][:limit]
        self._samples = [_sample(frames[i], headers[i], i, path) for i in numbers]
        self._ids = [sample.sample_id for sample in self._samples]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]

    @property
    def sample_ids(self) -> Sequence[str]:
        """Ids in the order of the file."""
        return self._ids

    @property
    def n_atoms(self) -> npt.NDArray[np.int32]:
        """Atoms of every frame, (n,) int32."""
        return np.array([len(s.structure) for s in self._samples], np.int32)


def _read_frames(path: Path) -> tuple[list[Atoms], list[str]]:
    """All frames of a file, and the header line of each."""
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        elif path.suffix == ".xz":
            raw = lzma.decompress(raw)
        text = raw.decode()
        headers = _header_lines(text)
        return list(ase.io.iread(io.StringIO(text), ":", format="extxyz")), headers
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except Exception as error:
        # ASE's parser raises a different class for every way a file can be torn.
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{path} cannot be read as extended XYZ ({reason}); it is damaged or of "
            "another format."
        ) from None


def _header_lines(text: str) -> list[str]:
    """Second line of every frame.

    A gap between frames is an error, since ASE's parser takes it for the end.
    """
    lines = text.rstrip().splitlines()
    headers = []
    start = 0
    while start < len(lines):
        if not lines[start].strip():
            raise ValueError(f"there is a gap between frames at line {start + 1}")
        headers.append(lines[start + 1])
        start += int(lines[start]) + 2
    return headers


def _sample(atoms: Atoms, header: str, number: int, path: str) -> Sample:
    sample_id = _sample_id(atoms, header, number)
    structure = Structure(
        atomic_numbers=atoms.numbers.astype(np.uint8),
        positions=np.ascontiguousarray(atoms.positions, np.float64),
        cell=np.ascontiguousarray(atoms.cell.array, np.float64),
        pbc=np.asarray(atoms.pbc, np.bool_),
        tags=_tags(atoms),
        fixed=_fixed(atoms),
    )
    if not np.isfinite(structure.positions).all():
        raise DataError(f"{path}: sample {sample_id!r} has positions that are NaN.")
    if len(structure) == 0:
        raise DataError(f"{path}: sample {sample_id!r} has no atoms.")
    results = atoms.calc.results if atoms.calc is not None else {}
    energy = float(results.get("energy", np.nan))
    forces = np.asarray(
        results.get("forces", np.full((len(atoms), 3), np.nan)), np.float32
    )
    return Sample(sample_id, structure, energy, forces)


def _sample_id(atoms: Atoms, header: str, number: int) -> str:
    # From the text: ASE would turn the id 007 into the number 7.
    if match := _SAMPLE_ID.search(header):
        return match.group(1) or match.group(2)
    if "sid" in atoms.info and "fid" in atoms.info:
        return f"{atoms.info['sid']}_{atoms.info['fid']}"
    return str(number)


def _tags(atoms: Atoms) -> npt.NDArray[np.int8]:
    if "tags" in atoms.arrays:
        return atoms.arrays["tags"].astype(np.int8)
    return np.full(len(atoms), MOLECULE_TAG, np.int8)


def _fixed(atoms: Atoms) -> npt.NDArray[np.bool_]:
    if "fixed" in atoms.arrays:
        return atoms.arrays["fixed"].astype(np.bool_)
    fixed = np.zeros(len(atoms), np.bool_)
    # ASE turns a move_mask column into this constraint.
    for constraint in atoms.constraints:
        whole = isinstance(constraint, FixCartesian) and all(constraint.mask)
        if whole or isinstance(constraint, FixAtoms):
            fixed[constraint.index] = True
    return fixed
