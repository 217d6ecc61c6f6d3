"""OC20's LMDB files: pickled PyG samples under the keys 0, 1, 2, ..."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipeline.datasets.base import Listing, RecordDataset, Selection, in_pieces
from pipeline.datasets.labels import ReadOptions, Record
from pipeline.datasets.lmdb_files import LmdbFile, lmdb_files
from pipeline.datasets.pyg_pickles import (
    Tensor,
    as_array,
    plain_integer,
    sample_fields,
)
from pipeline.datasets.samples import pair_id
from pipeline.datasets.unpickling import Refusal
from pipeline.errors import DataError
from pipeline.execution.passes import Run

# Samples that one process lists at a time.
PIECE = 4096


class Oc20LmdbDataset(RecordDataset):
    """Samples of one LMDB or a folder of them, read when they are asked for.

    Ids: ``{sid}_{fid}``, else ``sid``, else the running number over all files. Samples
    without ``pbc`` are periodic in three directions, as all of OC20 is.
    """

    columns: ClassVar[dict[str, str]] = {"number": "int64"}

    def __init__(
        self, paths: Sequence[Path], selection: Selection, options: ReadOptions
    ) -> None:
        super().__init__(paths, selection, options)
        self._files = lmdb_files(paths, ".lmdb")
        counts = [_count(file) for file in self._files]
        self._ends = list(accumulate(counts))
        self._total = sum(counts)

    def files(self) -> list[Path]:
        """All files with samples."""
        return [file.data for file in self._files]

    def list_frames(self, run: Run = map) -> Listing:
        """Ids and atom counts; reads every sample without decoding its arrays."""
        ids: list[str] = []
        sizes: list[int] = []
        numbers = self._selection.of(self._total)
        for found in run(self._scan_piece, in_pieces(numbers, PIECE)):
            ids += found[0]
            sizes += found[1]
        places = {"number": np.array(numbers, np.int64)}
        return Listing(ids, np.array(sizes, np.int32), places)

    def use(self, listing: Listing) -> None:
        """Take ``listing`` for that of this dataset."""
        super().use(listing)
        self._numbers = listing.places["number"]

    def record(self, index: int) -> Record:
        """The sample as it is in the file; what cannot be decoded is left out."""
        file, key = self._place(int(self._numbers[index]))
        where = _where(file, key)
        values, properties = {}, {}
        try:
            for name, part in _fields(file, key).items():
                if name in _STRUCTURE:
                    values[name] = as_array(part)
                else:
                    properties[name] = _decoded(part)
        except Refusal as refusal:
            raise DataError(f"{where} is refused: {refusal}.") from None
        return _as_record(values, properties, where)

    def place(self, index: int) -> str:
        """File and key of the sample."""
        return _where(*self._place(int(self._numbers[index])))

    def _place(self, number: int) -> tuple[LmdbFile, str]:
        """File and key of running number ``number``."""
        which = bisect_right(self._ends, number)
        first = self._ends[which - 1] if which else 0
        return self._files[which], str(number - first)

    def _scan_piece(self, numbers: range) -> tuple[list[str], list[int]]:
        found = [self._scan(number) for number in numbers]
        return [sample_id for sample_id, _ in found], [size for _, size in found]

    def _scan(self, number: int) -> tuple[str, int]:
        """Id and atom count, without decoding more than that takes."""
        file, key = self._place(number)
        where = _where(file, key)
        try:
            fields = _fields(file, key)
            if "pos" not in fields:
                raise DataError(f"{where} has no pos.")
            sid, fid = (_label(fields.get(name)) for name in ("sid", "fid"))
            pos = fields["pos"]
            shape = pos.size if isinstance(pos, Tensor) else as_array(pos).shape
        except Refusal as refusal:
            raise DataError(f"{where} is refused: {refusal}.") from None
        return pair_id(sid, fid) or str(number), shape[0] if shape else 0


_STRUCTURE = {"pos", "atomic_numbers", "cell", "tags", "fixed", "pbc"}


def _decoded(part: Any) -> Any:
    """A value as numbers or text; as it is where it is neither."""
    if isinstance(part, str):
        return part
    try:
        return as_array(part)
    except Refusal:
        return part


def _count(file: LmdbFile) -> int:
    """Samples in a file, by its ``length`` or else by its keys."""
    raw = file.get("length")
    if raw is None:
        return len(file.numeric_keys())
    try:
        length = plain_integer(raw)
    except Refusal as refusal:
        raise DataError(f"{_where(file, 'length')} is refused: {refusal}.") from None
    if length < 0:
        raise DataError(f"{file.path}: its length is {length}.")
    return length


def _fields(file: LmdbFile, key: str) -> dict[str, Any]:
    raw = file.get(key)
    if raw is None:
        raise DataError(f"{_where(file, key)} is missing; fetch the file again.")
    return sample_fields(raw)


def _where(file: LmdbFile, key: str) -> str:
    return f"{file.path}: sample {key!r}"


def _label(value: Any) -> str | None:
    """A sid or fid as text."""
    if value is None or type(value) is str:
        return value
    array = as_array(value)
    if array.size != 1:
        raise Refusal(f"its sid or fid has {array.size} values")
    return str(int(array.reshape(())))


def _as_record(
    values: dict[str, Any], properties: dict[str, Any], where: str
) -> Record:
    for name in ("atomic_numbers", "cell"):
        if name not in values:
            raise DataError(f"{where} has no {name}.")
    return Record(
        atomic_numbers=values["atomic_numbers"],
        positions=values.get("pos"),
        cell=values["cell"],
        pbc=values.get("pbc", (True, True, True)),
        tags=values.get("tags"),
        fixed=values.get("fixed"),
        properties=properties,
        energy_names=("y", "energy"),
        forces_names=("force", "forces"),
    )
