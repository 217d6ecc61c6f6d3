"""ASE databases in SQLite (.db) and JSON (.json) files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import ase.db
import numpy as np

from pipeline.datasets.base import IndexedDataset, Listing, Selection
from pipeline.datasets.rows import row_id, row_sample
from pipeline.errors import DataError
from pipeline.execution.passes import Run
from pipeline.structure import Sample

WINDOW = 1000
_ARRAYS = ("numbers", "positions", "cell", "pbc", "tags", "energy", "forces")


class AseDbDataset(IndexedDataset):
    """Rows of an ASE database in the order of their numbers.

    Ids as in an .aselmdb. SQLite rows are read when they are asked for; a JSON file is
    read once and kept in memory.
    """

    columns: ClassVar[dict[str, str]] = {"row": "int64"}

    def __init__(self, path: str, selection: Selection) -> None:
        super().__init__(path)
        self._type = Path(path).suffix.removeprefix(".")
        if self._type not in ("db", "json"):
            raise DataError(f"{path} is no ASE database; it must end in .db or .json.")
        if not Path(path).is_file():
            raise DataError(f"{path} does not exist.")
        self._selection = selection
        self._kept: dict[int, dict[str, Any]] = {}

    def files(self) -> list[Path]:
        """The file of the database."""
        return [Path(self.path)]

    @property
    def keeps_samples(self) -> bool:
        """A JSON file cannot be read in part."""
        return self._type == "json"

    def list_samples(self, run: Run = map) -> Listing:
        """Ids, atom counts and numbers of rows; one file is read by one process."""
        chosen = self._selection.of()
        ids, sizes, rows = [], [], []
        for place, (number, row) in enumerate(self._all_rows(chosen.stop)):
            if place in chosen:
                rows.append(number)
                ids.append(row_id(row, f"{self.path}: sample {number}") or str(number))
                sizes.append(len(row["numbers"]))
                if self._type == "json":
                    self._kept[number] = row
        places = {"row": np.array(rows, np.int64)}
        return Listing(ids, np.array(sizes, np.int32), places)

    def use(self, listing: Listing) -> None:
        """Take ``listing`` for that of this dataset."""
        super().use(listing)
        self._rows = listing.places["row"]

    def __getitem__(self, index: int) -> Sample:
        number = int(self._rows[index])
        where = f"{self.path}: sample {number}"
        row = self._kept.get(number)
        if row is None:
            try:
                row = _plain(self._connect().get(id=number))
            except Exception as error:
                raise _unreadable(where, error) from None
        return row_sample(row, self._ids[index], where)

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
