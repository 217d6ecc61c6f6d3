"""HDF5 files with a group for every molecule: the layouts of SPICE and of ANI-1x."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pipeline.datasets.base import Selection
from pipeline.datasets.file_units import reconcile_units
from pipeline.datasets.labels import ReadOptions, Record, is_label_like
from pipeline.datasets.numbered import Found, NumberedDataset, OpenFiles
from pipeline.datasets.rows import NO_CELL, NO_PBC
from pipeline.errors import DataError
from pipeline.spec.units import Units

log = logging.getLogger("pipeline.datasets")
MAX_PIECE_BYTES = 1 << 28
MAX_DEPTH = 8
_NUMBERS = "biuf"
_ELEMENTS = "atomic_numbers"
_CELL_LIKE = re.compile(r"pbc|cells?|lattice\w*|box\w*|cell_?\w*|unit_?cell", re.I)


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
    # Molecules whose units and names have been looked at.
    checked: set[str] = field(default_factory=set)

    def sample_id(self, frame: int) -> str:
        """Return ``GROUP/K`` of a frame."""
        return "/".join(map(str, self.place(frame))).lstrip("/")

    def place(self, frame: int) -> tuple[str, int]:
        """Return the molecule of a frame, and the frame's number within it."""
        which, first = self._molecule(frame)
        return self.groups[which], frame - first

    def n_frames(self, frame: int) -> int:
        """Return how many frames the molecule of a frame has."""
        which, first = self._molecule(frame)
        return int(self.ends[which]) - first

    def _molecule(self, frame: int) -> tuple[int, int]:
        which = int(np.searchsorted(self.ends, frame, side="right"))
        return which, int(self.ends[which - 1]) if which else 0


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
        where = self.place_of(file, frame)
        values = _Values(
            _group(opened.file, group), number, opened.n_frames(frame), where
        )
        if group not in opened.checked:
            self._check_group(file, values, where)
            opened.checked.add(group)
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

    def _check_group(self, file: Path, values: "_Values", where: str) -> None:
        """Refuse a molecule with a cell, or with other units than the first one."""
        layout = _open[file].layout
        periodic = [name for name in values.names if _CELL_LIKE.fullmatch(name)]
        if periodic:
            raise DataError(
                f"{where} has {periodic[0]!r}, but the layout of {layout.name} has no "
                "cell; write the frames as extended XYZ."
            )
        keys = _unit_keys(layout, self.options)
        stated = Units(**_said(values.group, keys)).over(layout.units)
        for part in (part for part, key in keys.items() if key in values.names):
            mine, first = (
                getattr(units.factors, part) for units in (stated, self._units[file])
            )
            if abs(mine / first - 1) > 1e-6:
                raise DataError(
                    f"{where}: {keys[part]!r} is in another unit than in the first "
                    "molecule of the file; write both in the same unit."
                )

    @staticmethod
    def place_of(file: Path, frame: int) -> str:
        """File, molecule and number of a conformation."""
        return f"{file}: sample {_open[file].sample_id(frame)!r}"


class _Values(Mapping[str, Any]):
    """The conformation's part of what its group holds; read when it is asked for.

    A minus sign before a name asks for the negative.
    """

    def __init__(self, group: Any, number: int, n_frames: int, where: str) -> None:
        self.group = group
        self._number, self._n_frames, self._where = number, n_frames, where
        self.names = list(group)

    def only(self, names: Sequence[str]) -> "_Values":
        """The same with other names."""
        found = _Values(self.group, self._number, self._n_frames, self._where)
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
            if name not in self.group and name.startswith("-"):
                return -np.asarray(self[name[1:]])
            return self._value(name)
        except (OSError, ValueError, RuntimeError, TypeError, MemoryError) as error:
            raise _unreadable(self._where, error) from None

    def _value(self, name: str) -> Any:
        data = _data_set(self.group, name)
        if data is None:
            return None
        if name == _ELEMENTS or (data.size == 1 and not is_label_like(name)):
            return _plain(data[()])
        if data.shape[:1] != (self._n_frames,):
            raise ValueError(
                f"{name!r} has shape {data.shape}, but the molecule has "
                f"{self._n_frames} conformations"
            )
        return _plain(data[self._number])


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
    first = _group(opened.file, opened.groups[0])
    stated = Units(**_said(first, _unit_keys(layout, options)))
    reconcile_units(file, stated, options.units, "the file itself")
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


def _unit_keys(layout: Layout, options: ReadOptions) -> dict[str, str]:
    """Names of the arrays whose units matter, by what they are units of."""
    return {
        "energy": options.energy_key or layout.energy,
        "length": layout.positions,
        "forces": options.gradient_key or options.forces_key or layout.forces,
    }


def _said(group: Any, keys: Mapping[str, str]) -> dict[str, str]:
    """Units that the arrays of a molecule state, by what they are units of."""
    found: dict[str, str] = {}
    for part, key in keys.items():
        if (data := _data_set(group, key)) is None:
            continue
        attributes = (data.attrs.get(name) for name in ("units", "unit"))
        words = [_plain(word) for word in attributes if word is not None]
        if words and isinstance(words[0], str):
            found[part] = words[0]
    return found


def _open_file(path: Path) -> _Opened:
    try:
        import h5py
    except ImportError:
        raise DataError(
            f"{path} needs the package h5py, which is not installed; pip install "
            "'kd-train[hdf5]'."
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


_open = OpenFiles(_open_file, shared=True)


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
