"""ASE databases in SQLite (.db) and JSON (.json) files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import ase.db
import numpy as np

from pipeline.datasets.base import Listing, RecordDataset, Selection
from pipeline.datasets.labels import ReadOptions, Record
from pipeline.datasets.rows import row_id, row_record
from pipeline.errors import DataError
from pipeline.execution.passes import Run

WINDOW = 1000
_ARRAYS = ("numbers", "positions", "cell", "pbc", "tags", "energy", "forces")


class AseDbDataset(RecordDataset):
    """Rows of an ASE database in the order of their numbers.

    Ids as in an .aselmdb. SQLite rows are read when they are asked for; a JSON file is
    read once and kept in memory.
    """

    columns: ClassVar[dict[str, str]] = {"row": "int64"}

    def __init__(
        self, paths: Sequence[Path], selection: Selection, options: ReadOptions
    ) -> None:
        super().__init__(paths, selection, options)
        if len(paths) > 1:
            raise DataError(f"{paths[1]}: a split reads one ASE database only.")
        path = str(paths[0])
        self._type = Path(path).suffix.removeprefix(".")
        if self._type not in ("db", "json"):
            raise DataError(f"{path} is no ASE database; it must end in .db or .json.")
        if not Path(path).is_file():
            raise DataError(f"{path} does not exist.")
        self._kept: dict[int, dict[str, Any]] = {}

    def files(self) -> list[Path]:
        """The file of the database."""
        return [Path(self.path)]

    @property
    def keeps_samples(self) -> bool:
        """A JSON file cannot be read in part."""
        return self._type == "json"

    def list_frames(self, run: Run = map) -> Listing:
        """Ids, atom counts and numbers of rows; one file is read by one process."""
        chosen = self._selection.of()
        ids, sizes, rows = [], [], []
        for place, (number, row) in enumerate(self._all_rows(chosen.stop)):
            if place in chosen:
                rows.append(number)
                ids.append(row_id(row) or str(number))
                sizes.append(len(row["numbers"]))
                if self._type == "json":
                    self._kept[number] = row
        places = {"row": np.array(rows, np.int64)}
        return Listing(ids, np.array(sizes, np.int32), places)

    def use(self, listing: Listing) -> None:
        """Take ``listing`` for that of this dataset."""
        super().use(listing)
        self._rows = listing.places["row"]

    def record(self, index: int) -> Record:
        """The row as it is in the file."""
        number = int(self._rows[index])
        where = self.place(index)
        row = self._kept.get(number)
        if row is None:
            try:
                row = _plain(self._connect().get(id=number))
            except Exception as error:
                raise _unreadable(where, error) from None
        return row_record(row, where)

    def place(self, index: int) -> str:
        """File and number of the row."""
        return f"{self.path}: sample {int(self._rows[index])}"

    def _connect(self) -> Any:
        return ase.db.connect(self.path, type=self._type, serial=True)

    def _all_rows(self, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and content of the first ``stop`` rows, in the order of numbers."""
        try:
            database = self._connect()
            if self._type == "json":
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
            raise _unreadable(self.path, error) from None


def _plain(row: Any) -> dict[str, Any]:
    """What samples need of ASE's row object."""
    plain = {name: row[name] for name in _ARRAYS if name in row}
    plain["constraints"] = [c.todict() for c in row.constraints]
    return plain | {"data": row.data, "key_value_pairs": row.key_value_pairs}


def _unreadable(where: str, error: Exception) -> DataError:
    # SQLite, JSON and ASE raise a different class for every way a file can be torn.
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{where} cannot be read as an ASE database ({reason}).")
