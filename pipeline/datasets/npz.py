"""Frames of one molecule in .npz files: the layouts of rMD17 and of sGDML and MD17."""

import logging
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pipeline.datasets.base import Selection
from pipeline.datasets.constraints import is_constraint_like
from pipeline.datasets.file_units import reconcile_units
from pipeline.datasets.labels import ReadOptions, Record
from pipeline.datasets.numbered import Found, NumberedDataset, OpenFiles
from pipeline.datasets.rows import NO_CELL
from pipeline.datasets.samples import id_text
from pipeline.errors import DataError
from pipeline.spec.units import Units

log = logging.getLogger("pipeline.datasets")
MAX_BYTES = 1 << 32
_NUMBERS = "biuf"
_CELL_LIKE = re.compile(r"latt|cell|box|pbc", re.I)


@dataclass(frozen=True)
class Layout:
    """Names of a layout's arrays; ``ids`` are numbers of the frames, if there."""

    name: str
    numbers: str
    positions: str
    energy: str
    forces: str
    ids: str | None = None
    cell: str | None = None
    energy_unit: str | None = None
    length_unit: str | None = None


LAYOUTS = (
    Layout(
        "rMD17", "nuclear_charges", "coords", "energies", "forces", ids="old_indices"
    ),
    Layout(
        "sGDML",
        "z",
        "R",
        "E",
        "F",
        cell="lattice",
        energy_unit="e_unit",
        length_unit="r_unit",
    ),
)
# Both publish in these; only files of sGDML may state others.
ASSUMED = Units(energy="kcal/mol", length="Å")


@dataclass(frozen=True, eq=False)
class _Arrays:
    """All arrays of a file, those of numbers and single words."""

    layout: Layout
    values: Mapping[str, npt.NDArray[Any]]

    @property
    def n_frames(self) -> int:
        return len(self.values[self.layout.positions])


class NpzDataset(NumberedDataset):
    """Frames of .npz files; a file is read whole, once by every process.

    Ids: ``old_indices`` where the file has them, else the number of the frame. Energies
    are in kcal/mol and lengths in Å, unless the file or the split names other units.
    """

    format: ClassVar[str] = "npz"
    suffixes: ClassVar[tuple[str, ...]] = (".npz",)

    def __init__(
        self, paths: Sequence[Path], selection: Selection, options: ReadOptions
    ) -> None:
        super().__init__(paths, selection, options)
        self._units = {file: _units(file, options) for file in self._files}

    @staticmethod
    def count(file: Path) -> int:
        """Return the number of frames in a file."""
        return _open[file].n_frames

    def look(self, file: Path, frames: range) -> Found:
        """Return ids and sizes of some frames."""
        arrays = _open[file]
        name = arrays.layout.ids or ""
        old = arrays.values.get(name)
        ids: list[str | None] = [None] * len(frames)
        # Several files count the same indices.
        if old is not None and old.size == arrays.n_frames and len(self._files) == 1:
            flat = old.reshape(-1)
            ids = [id_text(flat[i], name, f"{file}: sample {i}") for i in frames]
        n_atoms = len(arrays.values[arrays.layout.numbers])
        lost = tuple(sorted(filter(is_constraint_like, arrays.values)))
        return Found(ids, [n_atoms] * len(frames), [lost] * len(frames))

    def read(self, file: Path, frame: int) -> Record:
        """Return what a file has of one frame."""
        arrays = _open[file]
        layout, values = arrays.layout, arrays.values
        structure = {layout.numbers, layout.positions, layout.cell}
        cell = values.get(layout.cell or "")
        return Record(
            atomic_numbers=values[layout.numbers],
            positions=values[layout.positions][frame],
            # The lattice of sGDML has the vectors as columns.
            cell=NO_CELL if cell is None else cell.T,
            pbc=[cell is not None] * 3,
            properties={
                name: _of_frame(array, frame, arrays.n_frames)
                for name, array in values.items()
                if name not in structure
            },
            energy_names=(layout.energy,),
            forces_names=(layout.forces,),
            units=self._units[file],
        )


def _of_frame(array: npt.NDArray[Any], frame: int, n_frames: int) -> Any:
    """The frame's part of an array, or an array that is no column of frames."""
    if array.ndim and len(array) == n_frames:
        return array[frame]
    return array if array.ndim else array.item()


def _units(file: Path, options: ReadOptions) -> Units:
    """Units that the file states, and those of its layout where it states none."""
    arrays = _open[file]
    stated = Units(
        energy=_word(arrays, arrays.layout.energy_unit),
        length=_word(arrays, arrays.layout.length_unit),
    )
    reconcile_units(file, stated, options.units, "the file itself")
    assumed = [
        f"{part} in {getattr(ASSUMED, part)}"
        for part in ("energy", "length")
        if getattr(options.units.over(stated), part) is None
    ]
    if assumed:
        log.info(
            "%s: neither the file nor units: of the split states units; %s is assumed, "
            "as in files of %s",
            file,
            " and ".join(assumed),
            arrays.layout.name,
        )
    return stated.over(ASSUMED)


def _word(arrays: _Arrays, name: str | None) -> str | None:
    value = arrays.values.get(name or "")
    if value is None:
        return None
    word = value.reshape(-1)[0] if value.size == 1 else f"{value.tolist()}"
    return word.decode(errors="replace") if isinstance(word, bytes) else str(word)


def _read(file: Path) -> _Arrays:
    try:
        with file.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{file} holds a single array; it is no .npz file.")
            layout = _layout(file, archive.files)
            _refuse_huge(file)
            values = {name: archive[name] for name in archive.files}
    except DataError:
        raise
    except Exception as error:
        # zipfile, zlib and numpy raise a different class for every kind of damage.
        reason = " ".join(str(error).split()) or type(error).__name__
        if "allow_pickle" in reason:
            reason = "it holds Python objects, which could run code"
        raise DataError(f"{file} cannot be read as .npz ({reason}).") from None
    _check(file, layout, values)
    return _Arrays(layout, values)


_open = OpenFiles(_read, shared=True, limit=4)


def _layout(file: Path, names: Sequence[str]) -> Layout:
    for layout in LAYOUTS:
        if layout.numbers in names and layout.positions in names:
            return layout
    known = " or ".join(
        f"{layout.numbers} and {layout.positions} ({layout.name})" for layout in LAYOUTS
    )
    raise DataError(
        f"{file} has the arrays {', '.join(names[:12])}, which is no known layout; it "
        f"needs {known}."
    )


def _refuse_huge(file: Path) -> None:
    """Refuse what would unpack to more than memory may hold."""
    with zipfile.ZipFile(file) as archive:
        size = sum(part.file_size for part in archive.infolist())
    if size > MAX_BYTES:
        raise DataError(
            f"{file} unpacks to {size >> 20} MB and is refused; at most "
            f"{MAX_BYTES >> 20} MB are read."
        )


def _check(file: Path, layout: Layout, values: Mapping[str, npt.NDArray[Any]]) -> None:
    """Refuse arrays that do not belong together."""
    numbers, positions = values[layout.numbers], values[layout.positions]
    if numbers.ndim != 1 or numbers.dtype.kind not in _NUMBERS:
        raise DataError(
            f"{file}: {layout.numbers} has shape {numbers.shape} and type "
            f"{numbers.dtype}, expected one atomic number for each atom, the same in "
            "all frames."
        )
    if positions.ndim != 3 or positions.shape[1:] != (len(numbers), 3):
        raise DataError(
            f"{file}: {layout.positions} has shape {positions.shape}, expected "
            f"(frames, {len(numbers)}, 3)."
        )
    for name in (layout.energy, layout.forces):
        if name in values and len(np.atleast_1d(values[name])) != len(positions):
            raise DataError(
                f"{file}: {name} has shape {values[name].shape}, but "
                f"{layout.positions} has {len(positions)} frames."
            )
    for name in values:
        if name != layout.cell and _CELL_LIKE.search(name):
            raise DataError(
                f"{file} has {name!r}, but the layout of {layout.name} has "
                f"{'the cell as ' + layout.cell if layout.cell else 'no cell'}; "
                "write the frames as extended XYZ."
            )
