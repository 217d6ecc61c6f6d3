"""HDF5 files with a group for every molecule: the layouts of SPICE and of ANI-1x."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pipeline.datasets.base import Selection
from pipeline.datasets.file_units import agreed_units
from pipeline.datasets.labels import ReadOptions, Record
from pipeline.datasets.numbered import Found, NumberedDataset, OpenFiles
from pipeline.datasets.rows import NO_CELL, NO_PBC
from pipeline.errors import DataError
from pipeline.spec.units import Units

log = logging.getLogger("pipeline.datasets")
MAX_PIECE_BYTES = 1 << 28
MAX_DEPTH = 8
_NUMBERS = "biuf"
_ELEMENTS = "atomic_numbers"


@dataclass(frozen=True)
class Layout:
    """Names of a layout's data sets, and the units of its publication."""

    name: str
    positions: str
    energy: str
    forces: str
    gradient: bool
    units: Units


LAYOUTS = (
    Layout(
        "SPICE",
        "conformations",
        "dft_total_energy",
        "dft_total_gradient",
        True,
        Units("Hartree", "Bohr"),
    ),
    Layout(
        "ANI-1x",
        "coordinates",
        "wb97x_dz.energy",
        "wb97x_dz.forces",
        False,
        Units("Hartree", "Å"),
    ),
)


@dataclass(frozen=True, eq=False)
class _Opened:
    """An open file, names of its molecules, and for each of these two counts.

    ``ends`` (g,) count the frames up to the end of a molecule, ``n_atoms`` (g,) atoms.
    """

    file: Any
    layout: Layout
    groups: list[str]
    ends: npt.NDArray[np.int64]
    n_atoms: npt.NDArray[np.int64]

    def sample_id(self, frame: int) -> str:
        """Return ``GROUP/K`` of a frame."""
        return "/".join(map(str, self.place(frame))).lstrip("/")

    def place(self, frame: int) -> tuple[str, int]:
        """Return the molecule of a frame, and the frame's number within it."""
        which = int(np.searchsorted(self.ends, frame, side="right"))
        return self.groups[which], frame - (int(self.ends[which - 1]) if which else 0)


class Hdf5Dataset(NumberedDataset):
    """Conformations in HDF5 files, read when they are asked for.

    Ids: ``GROUP/K``, after the name of the file if there are several. Units are those
    of the layout's publication, unless the file or the split names others.
    """

    format: ClassVar[str] = "hdf5"
    suffixes: ClassVar[tuple[str, ...]] = (".h5", ".hdf5", ".hdf")

    def __init__(
        self, paths: Sequence[Path], selection: Selection, options: ReadOptions
    ) -> None:
        super().__init__(paths, selection, options)
        self._units = {file: _units(file, options) for file in self._files}

    @staticmethod
    def count(file: Path) -> int:
        """Return the number of conformations in a file."""
        ends = _open[file].ends
        return int(ends[-1]) if len(ends) else 0

    def look(self, file: Path, frames: range) -> Found:
        """Return ids and sizes of some conformations."""
        opened = _open[file]
        before = f"{file.stem}/" if len(self._files) > 1 else ""
        which = np.searchsorted(opened.ends, np.array(frames, np.int64), side="right")
        return Found(
            [f"{before}{opened.sample_id(frame)}" for frame in frames],
            opened.n_atoms[which].tolist(),
            [()] * len(frames),
        )

    def place(self, index: int) -> str:
        """File, molecule and number of the conformation."""
        return self.place_of(*self._place(index))

    def read(self, file: Path, frame: int) -> Record:
        """Return what a file has of one conformation."""
        opened = _open[file]
        group, number = opened.place(frame)
        layout = opened.layout
        values = _Values(_group(opened.file, group), number, self.place_of(file, frame))
        forces = layout.forces
        if layout.gradient and forces in values.names:
            # What the gradient is the negative of has a name of its own.
            forces = f"-{layout.forces}"
        structure = (_ELEMENTS, layout.positions)
        names = [name for name in values.names if name not in structure]
        return Record(
            atomic_numbers=values[_ELEMENTS],
            positions=values[layout.positions],
            cell=NO_CELL,
            pbc=NO_PBC,
            properties=values.only([*names, forces]),
            energy_names=(layout.energy,),
            forces_names=(forces,),
            units=self._units[file],
        )

    @staticmethod
    def place_of(file: Path, frame: int) -> str:
        """File, molecule and number of a conformation."""
        return f"{file}: sample {_open[file].sample_id(frame)!r}"


class _Values(Mapping[str, Any]):
    """The conformation's part of what its group holds; read when it is asked for.

    A minus sign before a name asks for the negative.
    """

    def __init__(self, group: Any, number: int, where: str) -> None:
        self._group, self._number, self._where = group, number, where
        self.names = list(group)

    def only(self, names: Sequence[str]) -> "_Values":
        """The same with other names."""
        found = _Values(self._group, self._number, self._where)
        found.names = list(dict.fromkeys(names))
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        try:
            if name not in self._group and name.startswith("-"):
                return -np.asarray(self[name[1:]])
            return self._value(name)
        except (OSError, ValueError, RuntimeError, TypeError, MemoryError) as error:
            raise _unreadable(self._where, error) from None

    def _value(self, name: str) -> Any:
        data = _data_set(self._group, name)
        if data is None:
            return None
        if name == _ELEMENTS or data.size == 1:
            return _plain(data[()])
        return _plain(data[self._number]) if data.ndim else None


def _plain(value: Any) -> Any:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _data_set(group: Any, name: str) -> Any:
    """The group's own data set of numbers or words; None if it is something else.

    Raises
    ------
    ValueError
        A piece of it is too large for memory.
    """
    import h5py

    # Other links could lead to other files.
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        return None
    data = group[name]
    if not isinstance(data, h5py.Dataset) or data.is_virtual or data.external:
        return None
    if data.dtype.kind not in _NUMBERS and h5py.check_string_dtype(data.dtype) is None:
        return None
    pieces = (data.chunks or (), data.shape[1:])
    largest = max(np.prod(piece, dtype=float) for piece in pieces)
    if largest * data.dtype.itemsize > MAX_PIECE_BYTES:
        raise ValueError(f"{name!r} has pieces of over {MAX_PIECE_BYTES >> 20} MB")
    return data


def _group(file: Any, name: str) -> Any:
    return file[name] if name else file


def _units(file: Path, options: ReadOptions) -> Units:
    """Units that the first molecule states, and those of the layout otherwise."""
    opened = _open[file]
    layout = opened.layout
    keys = {
        "energy": options.energy_key or layout.energy,
        "length": layout.positions,
        "forces": options.gradient_key or options.forces_key or layout.forces,
    }
    first = _group(opened.file, opened.groups[0])
    said = {
        part: _plain(data.attrs.get("units"))
        for part, key in keys.items()
        if (data := _data_set(first, key)) is not None
    }
    stated = Units(**{p: u for p, u in said.items() if isinstance(u, str)})
    agreed_units(file, stated, options.units, "the file itself")
    assumed = [
        f"{part} in {getattr(layout.units, part)}"
        for part in ("energy", "length")
        if getattr(options.units.over(stated), part) is None
    ]
    if assumed:
        log.info(
            "%s: neither the file nor units: of the split states units; %s is assumed, "
            "as in files of %s",
            file,
            " and ".join(assumed),
            layout.name,
        )
    return stated.over(layout.units)


def _opened(path: Path) -> _Opened:
    try:
        import h5py
    except ImportError:
        raise DataError(
            f"{path} takes h5py to read, which is not installed; "
            "pip install 'kd-train[hdf5]'."
        ) from None
    try:
        file = h5py.File(path, "r", locking=False)
        found = list(_molecules(file, "", set()))
        layout = _layout(path, file, found)
        rows = [_counts(path, _group(file, name), name, layout) for name in found]
    except DataError:
        raise
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise _unreadable(str(path), error) from None
    counts = np.array(rows, np.int64).reshape(-1, 2)
    return _Opened(file, layout, found, np.cumsum(counts[:, 0]), counts[:, 1])


_open = OpenFiles(_opened, shared=True)


def _molecules(group: Any, name: str, seen: set[int]) -> Iterator[str]:
    """Names of all groups that have atomic numbers."""
    import h5py

    address = h5py.h5o.get_info(group.id).addr
    if address in seen:
        raise ValueError(f"its group {name!r} has a second name")
    seen.add(address)
    if _ELEMENTS in group:
        yield name
        return
    if name.count("/") == MAX_DEPTH:
        raise ValueError(f"its groups are nested more than {MAX_DEPTH} deep")
    for key in group:
        if isinstance(group.get(key, getlink=True), h5py.HardLink):
            inner = group[key]
            if isinstance(inner, h5py.Group):
                yield from _molecules(inner, f"{name}/{key}".lstrip("/"), seen)


def _layout(path: Path, file: Any, groups: Sequence[str]) -> Layout:
    if not groups:
        raise DataError(
            f"{path} has no group with {_ELEMENTS!r}; the layouts of "
            f"{' and '.join(layout.name for layout in LAYOUTS)} have one for each "
            "molecule."
        )
    first = _group(file, groups[0])
    for layout in LAYOUTS:
        if layout.positions in first:
            return layout
    known = " or ".join(f"{each.positions!r} ({each.name})" for each in LAYOUTS)
    raise DataError(
        f"{path}: group {groups[0]!r} has {', '.join(list(first)[:12])}, but no "
        f"{known}."
    )


def _counts(path: Path, group: Any, name: str, layout: Layout) -> tuple[int, int]:
    """Frames and atoms of a molecule."""
    sets = [_data_set(group, key) for key in (layout.positions, _ELEMENTS)]
    if any(data is None for data in sets):
        raise DataError(
            f"{path}: group {name!r} lacks {layout.positions!r} or {_ELEMENTS!r} as "
            "arrays of numbers."
        )
    shape, atoms = (data.shape for data in sets)
    if len(shape) != 3 or len(atoms) != 1 or shape[1:] != (atoms[0], 3):
        raise DataError(
            f"{path}: group {name!r} has {layout.positions} of shape {shape} and "
            f"{_ELEMENTS} of shape {atoms}, expected (frames, atoms, 3) and (atoms,)."
        )
    return int(shape[0]), int(atoms[0])


def _unreadable(where: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{where} cannot be read as HDF5 ({reason}).")
