"""ASE databases in SQLite (.db) and JSON (.json) files."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import ase.db
import numpy as np
import numpy.typing as npt
from ase.calculators.calculator import all_properties

from pipeline.datasets.base import Listing, RecordDataset, Selection
from pipeline.datasets.constraints import warn_of_constraints
from pipeline.datasets.file_units import metadata_units
from pipeline.datasets.labels import ReadOptions, Record
from pipeline.datasets.paths import find_files, refuse_twins
from pipeline.datasets.rows import lost_constraints, row_id, row_record
from pipeline.errors import DataError
from pipeline.parallel.ordered_map import OrderedMap
from pipeline.spec.units import Units

WINDOW = 1000
SUFFIXES = (".db", ".json")
_ARRAYS = ("numbers", "positions", "cell", "pbc", "tags", *all_properties)


class AseDbDataset(RecordDataset):
    """Rows of ASE databases in the order of their numbers.

    Ids as in an .aselmdb. SQLite rows are read when they are asked for; a JSON file is
    read once and kept in memory. Units of labels in ``data`` and of lengths are those
    of the metadata, where it names them.
    """

    format: ClassVar[str] = "ase_db"
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES
    columns: ClassVar[dict[str, str]] = {"file": "int32", "row": "int64"}

    def __init__(
        self, paths: Sequence[Path], selection: Selection, options: ReadOptions
    ) -> None:
        super().__init__(paths, selection, options)
        self._files = find_files(paths, SUFFIXES, packed=())
        for file in self._files:
            if file.suffix not in SUFFIXES:
                raise DataError(
                    f"{file} is no ASE database; it must end in .db or .json."
                )
            if not file.is_file():
                raise DataError(f"{file} does not exist.")
        refuse_twins(self._files, SUFFIXES)
        self._units = [_units(file, options) for file in self._files]
        self._kept: dict[tuple[int, int], dict[str, Any]] = {}

    def files(self) -> list[Path]:
        """The files of the databases."""
        return self._files

    @property
    def keeps_samples(self) -> bool:
        """A JSON file cannot be read in part."""
        return any(file.suffix == ".json" for file in self._files)

    def list_frames(self, run: OrderedMap = map) -> Listing:
        """Ids, atom counts and numbers of rows; all files are read by one process."""
        chosen = self._selection.of()
        ids, sizes, places, lost = [], [], [], []
        for place, (which, number, row) in enumerate(self._all_rows(chosen.stop)):
            if place not in chosen:
                continue
            file = self._files[which]
            bare = str(number) if len(self._files) == 1 else f"{file.stem}_{number}"
            try:
                own = row_id(row, f"{file}: sample {number}")
                size = len(row["numbers"])
            except DataError:
                if not self.options.keep_bad:
                    raise
                own, size = None, 0
            ids.append(own or bare)
            sizes.append(size)
            places.append((which, number))
            lost.append(lost_constraints(row))
            if file.suffix == ".json":
                self._kept[which, number] = row
        warn_of_constraints(self.path, lost)
        columns = np.array(places, np.int64).reshape(-1, 2)
        files = columns[:, 0].astype(np.int32)
        found: dict[str, npt.NDArray[Any]] = {"file": files, "row": columns[:, 1]}
        return Listing(ids, np.array(sizes, np.int32), found)

    def use(self, listing: Listing) -> None:
        """Take ``listing`` for that of this dataset."""
        super().use(listing)
        self._places = listing.places

    def record(self, index: int) -> Record:
        """The row as it is in the file."""
        which, _ = self._place(index)
        record = row_record(self._row(index), self.place(index))
        return replace(record, units=self._units[which])

    def relist(self, index: int) -> None:
        """Raise DataError again if the row could not be listed."""
        row_id(self._row(index), self.place(index))

    def _row(self, index: int) -> dict[str, Any]:
        which, number = self._place(index)
        row = self._kept.get((which, number))
        if row is not None:
            return row
        try:
            return _plain(_connect(self._files[which]).get(id=number))
        except Exception as error:
            raise _unreadable(self.place(index), error) from None

    def place(self, index: int) -> str:
        """File and number of the row."""
        which, number = self._place(index)
        return f"{self._files[which]}: sample {number}"

    def _place(self, index: int) -> tuple[int, int]:
        return int(self._places["file"][index]), int(self._places["row"][index])

    def _all_rows(self, stop: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """File, number and content of the first ``stop`` rows."""
        done = 0
        for which, file in enumerate(self._files):
            for number, row in _rows(file, stop - done):
                yield which, number, row
                done += 1
            if done >= stop:
                return


def _connect(file: Path) -> Any:
    return ase.db.connect(str(file), type=file.suffix.removeprefix("."), serial=True)


def _units(file: Path, options: ReadOptions) -> Units:
    try:
        metadata = _connect(file).metadata
    except Exception as error:
        raise _unreadable(str(file), error) from None
    return metadata_units(file, metadata, options)


def _rows(file: Path, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of the first ``stop`` rows, in the order of numbers."""
    try:
        database = _connect(file)
        if file.suffix == ".json":
            for row in database.select():
                yield row.id, _plain(row)
            return
        last = done = 0
        # ASE fetches all rows that a selection has at once.
        while rows := list(
            database.select(f"id>{last}", sort="id", limit=min(WINDOW, stop - done))
        ):
            yield from ((row.id, _plain(row)) for row in rows)
            last, done = rows[-1].id, done + len(rows)
            if done >= stop:
                return
    except Exception as error:
        raise _unreadable(str(file), error) from None


def _plain(row: Any) -> dict[str, Any]:
    """What samples need of ASE's row object."""
    plain = {name: row[name] for name in _ARRAYS if name in row}
    plain["constraints"] = [c.todict() for c in row.constraints]
    return plain | {"data": row.data, "key_value_pairs": row.key_value_pairs}


def _unreadable(where: str, error: Exception) -> DataError:
    # SQLite, JSON and ASE raise a different class for every way a file can be torn.
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{where} cannot be read as an ASE database ({reason}).")
