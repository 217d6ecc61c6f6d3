"""Trajectories of ASE (.traj): arrays and JSON in one file, nothing that could run."""

import mmap
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ase.calculators.calculator import all_properties
from ase.io import ulm
from ase.io.jsonio import decode

from pipeline.datasets.constraints import find_held_atoms
from pipeline.datasets.labels import Record
from pipeline.datasets.numbered import Found, NumberedDataset, OpenFiles
from pipeline.datasets.packing import packer_of
from pipeline.datasets.rows import NO_CELL, NO_PBC, row_id
from pipeline.errors import DataError

_TAG = "ASE-Trajectory"
_NUMBERS = "biuf"


class TrajDataset(NumberedDataset):
    """Images of ASE trajectories, read when they are asked for.

    Ids: ``sample_id``, else ``{sid}_{fid}``, else ``sid`` of the image's ``info``, else
    its number. Labels are what the image's calculator has computed.
    """

    format: ClassVar[str] = "traj"
    suffixes: ClassVar[tuple[str, ...]] = (".traj",)

    @staticmethod
    def count(file: Path) -> int:
        """Return the number of images in a file."""
        return len(_open[file])

    def look(self, file: Path, frames: range) -> Found:
        """Return ids, sizes and lost constraints of some images."""
        found = Found()
        for frame in frames:
            where = f"{file}: sample {frame}"
            try:
                image, head = _image(file, frame)
                numbers = _value(head, "numbers")
                _, lost = find_held_atoms(_constraints(head), len(numbers))
                info = _info(image)
            except Exception as error:
                raise _unreadable(where, error) from None
            found.ids.append(row_id({"data": info}, where))
            found.sizes.append(len(numbers))
            found.lost.append(lost)
        return found

    def read(self, file: Path, frame: int) -> Record:
        """Return what a file has of one image."""
        try:
            return _record(*_image(file, frame))
        except Exception as error:
            raise _unreadable(f"{file}: sample {frame}", error) from None


def _open_file(path: Path) -> ulm.Reader:
    try:
        with path.open("rb") as stream:
            _refuse_others(stream.read(8))
            # Reads beyond the end of a map are short ones, however large they ask for.
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        reader = ulm.Reader(content)
        if reader.get_tag() != _TAG:
            raise ValueError(f"it is a file of {reader.get_tag()!r}")
    except Exception as error:
        raise _unreadable(str(path), error) from None
    return reader


def _refuse_others(head: bytes) -> None:
    if not head:
        raise ValueError("it is empty")
    if packer_of(head) is not None:
        raise ValueError("it is packed; unpack it first")


_open = OpenFiles(_open_file, shared=False)


def _image(file: Path, frame: int) -> tuple[ulm.Reader, ulm.Reader]:
    """An image, and the one with its header: that image itself or the first."""
    reader = _open[file]
    image = reader[frame]
    return image, image if "numbers" in image else reader[0]


def _record(image: ulm.Reader, head: ulm.Reader) -> Record:
    numbers = _value(head, "numbers")
    fixed, lost = find_held_atoms(_constraints(head), len(numbers))
    results = image.get("calculator")
    properties = _info(image)
    if isinstance(results, ulm.Reader):
        found = {name: _value(results, name) for name in all_properties}
        properties |= {name: part for name, part in found.items() if part is not None}
    return Record(
        atomic_numbers=numbers,
        positions=_value(image, "positions"),
        cell=_value(image, "cell", NO_CELL),
        pbc=_value(head, "pbc", NO_PBC),
        tags=_value(image, "tags"),
        fixed=fixed,
        lost=lost,
        properties=properties,
    )


def _value(reader: ulm.Reader, name: str, default: Any = None) -> Any:
    """A value or an array of numbers; refuses what memory could not hold."""
    if name not in reader:
        return default
    try:
        array = reader.proxy(name)
    except AssertionError:
        return reader.get(name)
    if array.dtype.kind not in _NUMBERS:
        raise ValueError(f"its {name} are of type {array.dtype}, not numbers")
    if any(size < 0 for size in array.shape) or array.nbytes > len(array.fd):
        raise ValueError(f"its {name} are larger than the file")
    return np.array(array.read())


def _info(image: ulm.Reader) -> dict[str, Any]:
    info = image.get("info")
    return dict(info) if isinstance(info, dict) else {}


def _constraints(head: ulm.Reader) -> Any:
    found = head.get("constraints") or "[]"
    return decode(found) if isinstance(found, str) else found


def _unreadable(where: str, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    # ASE and numpy raise a different class for every way a file can be torn.
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{where} cannot be read as an ASE trajectory ({reason}).")
