"""fairchem 2's ASE databases in LMDB, decoded without ASE: zlib and JSON, data only."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pipeline.datasets.base import Listing, RecordDataset, Selection, in_pieces
from pipeline.datasets.labels import ReadOptions, Record
from pipeline.datasets.lmdb_files import LmdbFile, lmdb_files
from pipeline.datasets.rows import row_id, row_record
from pipeline.errors import DataError
from pipeline.execution.passes import Run

# Rows that one process lists at a time.
PIECE = 4096

# A row of 500 atoms takes 0.1 MB.
MAX_ROW_BYTES = 1 << 24
_NUMBERS = {"bool", *(f"{sign}int{n}" for sign in ("", "u") for n in (8, 16, 32, 64))}
_NUMBERS |= {"float16", "float32", "float64"}


class AselmdbDataset(RecordDataset):
    """Rows of one .aselmdb file or a folder of them, read when they are asked for.

    Ids: ``sample_id``, else ``{sid}_{fid}``, else ``sid`` of the row's data, else the
    row's number, after the file's name if there are several.
    """

    columns: ClassVar[dict[str, str]] = {"file": "int32", "key": "int64"}

    def __init__(
        self, paths: Sequence[Path], selection: Selection, options: ReadOptions
    ) -> None:
        super().__init__(paths, selection, options)
        self._files = lmdb_files(paths, ".aselmdb")

    def files(self) -> list[Path]:
        """All files with samples."""
        return [file.data for file in self._files]

    def list_frames(self, run: Run = map) -> Listing:
        """Ids, atom counts and keys; decodes every row."""
        keys = [np.array(file.numeric_keys(), np.int64) for file in self._files]
        owner = np.repeat(np.arange(len(keys), dtype=np.int32), [len(k) for k in keys])
        chosen = self._selection.of(len(owner))
        part = slice(chosen.start, chosen.stop, chosen.step)
        files, numbers = owner[part], np.concatenate(keys)[part]
        pieces = zip(in_pieces(files, PIECE), in_pieces(numbers, PIECE), strict=True)
        ids: list[str] = []
        sizes: list[int] = []
        for found in run(self._scan_piece, pieces):
            ids += found[0]
            sizes += found[1]
        return Listing(ids, np.array(sizes, np.int32), {"file": files, "key": numbers})

    def use(self, listing: Listing) -> None:
        """Take ``listing`` for that of this dataset."""
        super().use(listing)
        self._places = listing.places

    def record(self, index: int) -> Record:
        """The row as it is in the file."""
        return row_record(_row(*self._place(index)), self.place(index))

    def place(self, index: int) -> str:
        """File and key of the row."""
        return _where(*self._place(index))

    def _place(self, index: int) -> tuple[LmdbFile, str]:
        file = self._files[int(self._places["file"][index])]
        return file, str(self._places["key"][index])

    def _scan_piece(
        self, places: tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]
    ) -> tuple[list[str], list[int]]:
        """Ids and atom counts of rows; ``places`` are their files and keys."""
        ids, sizes = [], []
        for number, key in zip(*(column.tolist() for column in places), strict=True):
            file = self._files[number]
            row = _row(file, str(key))
            alone = len(self._files) == 1
            bare = str(key) if alone else f"{file.path.stem}_{key}"
            ids.append(row_id(row) or bare)
            sizes.append(len(_sequence(row.get("numbers"), _where(file, str(key)))))
        return ids, sizes


def _where(file: LmdbFile, key: str) -> str:
    return f"{file.path}: sample {key!r}"


def _sequence(value: Any, where: str) -> Any:
    if isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim):
        return value
    raise DataError(f"{where} has no atoms.")


def _row(file: LmdbFile, key: str) -> dict[str, Any]:
    where = _where(file, key)
    raw = file.get(key)
    if raw is None:
        raise DataError(f"{where} is missing; fetch the file again.")
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(raw, MAX_ROW_BYTES)
        if unpacker.unconsumed_tail:
            raise DataError(
                f"{where} unpacks to more than {MAX_ROW_BYTES >> 20} MB and is refused."
            )
        if not unpacker.eof:
            raise ValueError("it is cut off")
        row = json.loads(text, object_hook=_numbers)
    except DataError:
        raise
    except (zlib.error, ValueError, RecursionError) as error:
        raise DataError(f"{where} is damaged ({error}).") from None
    if not isinstance(row, dict):
        raise DataError(f"{where} holds a {type(row).__name__}, not a row.")
    return row


def _numbers(item: dict[str, Any]) -> Any:
    """An encoded array of numbers as one; everything else as it is."""
    match item.get("__ndarray__"):
        case [list(shape), str(name), list(flat)] if name in _NUMBERS:
            try:
                return np.array(flat, name).reshape(shape)
            except (TypeError, OverflowError) as error:
                raise ValueError(str(error)) from None
    return item
