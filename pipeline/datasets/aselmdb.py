"""fairchem 2's ASE databases in LMDB, decoded without ASE: zlib and JSON, data only."""

import json
import logging
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.datasets.base import Listing, RecordDataset, Selection, split_pieces
from pipeline.datasets.constraints import warn_of_constraints
from pipeline.datasets.file_units import metadata_units
from pipeline.datasets.labels import ReadOptions, Record
from pipeline.datasets.lmdb_files import LAST, LmdbFile, key_text, lmdb_files
from pipeline.datasets.rows import lost_constraints, row_id, row_record
from pipeline.errors import DataError
from pipeline.parallel.ordered_map import OrderedMap
from pipeline.spec.units import Units

log = logging.getLogger("pipeline.datasets")
_T = TypeVar("_T")
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

    format: ClassVar[str] = "aselmdb"
    suffixes: ClassVar[tuple[str, ...]] = (".aselmdb",)
    columns: ClassVar[dict[str, str]] = {"file": "int32", "key": "int64"}

    def __init__(
        self, paths: Sequence[Path], selection: Selection, options: ReadOptions
    ) -> None:
        super().__init__(paths, selection, options)
        self._files = lmdb_files(paths, self.suffixes[0])
        self._units = [_units(file, options) for file in self._files]

    def files(self) -> list[Path]:
        """All files with samples."""
        return [file.data for file in self._files]

    def list_frames(self, run: OrderedMap = map) -> Listing:
        """Ids, atom counts and keys; decodes every row."""
        keys = [_codes(file) for file in self._files]
        owner = np.repeat(np.arange(len(keys), dtype=np.int32), [len(k) for k in keys])
        chosen = self._selection.of(len(owner))
        part = slice(chosen.start, chosen.stop, chosen.step)
        files, numbers = owner[part], np.concatenate(keys)[part]
        pieces = zip(
            split_pieces(files, PIECE), split_pieces(numbers, PIECE), strict=True
        )
        ids: list[str] = []
        sizes: list[int] = []
        lost: list[tuple[str, ...]] = []
        for found in run(self._scan_piece, pieces):
            ids += found[0]
            sizes += found[1]
            lost += found[2]
        warn_of_constraints(self.path, lost)
        return Listing(ids, np.array(sizes, np.int32), {"file": files, "key": numbers})

    def use(self, listing: Listing) -> None:
        """Take ``listing`` for that of this dataset."""
        super().use(listing)
        self._places = listing.places

    def record(self, index: int) -> Record:
        """The row as it is in the file."""
        record = row_record(_row(*self._place(index)), self.place(index))
        which = int(self._places["file"][index])
        return replace(record, units=self._units[which])

    def place(self, index: int) -> str:
        """File and key of the row."""
        return _where(*self._place(index))

    def _place(self, index: int) -> tuple[LmdbFile, bytes]:
        file = self._files[int(self._places["file"][index])]
        return file, file.key(int(self._places["key"][index]))

    def _scan_piece(
        self, places: tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]
    ) -> tuple[list[str], list[int], list[tuple[str, ...]]]:
        """Ids, atom counts and lost constraints; ``places`` are files and keys."""
        ids, sizes, lost = [], [], []
        for number, code in zip(*(column.tolist() for column in places), strict=True):
            file = self._files[number]
            key = file.key(code)
            try:
                own, size, constraints = _listed(file, key)
            except DataError:
                if not self.options.keep_bad:
                    raise
                own, size, constraints = None, 0, ()
            alone = len(self._files) == 1
            bare = key_text(key) if alone else f"{file.path.stem}_{key_text(key)}"
            ids.append(own or bare)
            sizes.append(size)
            lost.append(constraints)
        return ids, sizes, lost

    def relist(self, index: int) -> None:
        """Raise DataError again if the row could not be listed."""
        _listed(*self._place(index))


def _listed(file: LmdbFile, key: bytes) -> tuple[str | None, int, tuple[str, ...]]:
    """Id, if there is one, atom count and lost constraints of a row."""
    where = _where(file, key)
    row = _row(file, key)
    size = len(_sequence(row.get("numbers"), where))
    return row_id(row, where), size, lost_constraints(row)


def _codes(file: LmdbFile) -> npt.NDArray[np.int64]:
    """Codes of the keys of a file's rows without deleted ones; warns of missing rows.

    As in fairchem, ``nextid`` is one more than the last number given out, and numbers
    in ``deleted_ids`` are no rows.
    """
    codes = file.codes()
    deleted = _entry(file, b"deleted_ids", list) or []
    if not all(type(number) is int for number in deleted):
        raise DataError(f"{file.path}: 'deleted_ids' holds something but numbers.")
    # Of the file's own numbers: others could be too large for an array.
    gone = np.array([n for n in deleted if 0 <= n <= LAST], np.int64)
    codes = codes[~np.isin(codes, gone)]
    next_id = _entry(file, b"nextid", int)
    if next_id is not None:
        expected = next_id - 1 - len({n for n in deleted if 0 < n < next_id})
        if expected != len(codes):
            log.warning(
                "%s holds %d rows, but nextid and deleted_ids announce %d; %s",
                file.path,
                len(codes),
                expected,
                "rows may be missing" if expected > len(codes) else "all are read",
            )
    return codes


def _units(file: LmdbFile, options: ReadOptions) -> Units:
    """Units that the file's metadata names."""
    return metadata_units(file.path, _entry(file, b"metadata", dict), options)


def _entry(file: LmdbFile, key: bytes, kind: type[_T]) -> _T | None:
    """The file's own entry ``key``, which is a ``kind``; None if there is none."""
    if file.get(key) is None:
        return None
    value = _decode(file, key)
    if type(value) is not kind:
        raise DataError(
            f"{file.path}: {key_text(key)!r} holds a {type(value).__name__}, "
            f"not a {kind.__name__}."
        )
    return value


def _where(file: LmdbFile, key: bytes) -> str:
    return f"{file.path}: sample {key_text(key)!r}"


def _sequence(value: Any, where: str) -> Any:
    if isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim):
        return value
    raise DataError(f"{where} has no atoms.")


def _row(file: LmdbFile, key: bytes) -> dict[str, Any]:
    row = _decode(file, key)
    if not isinstance(row, dict):
        raise DataError(f"{_where(file, key)} holds a {type(row).__name__}, not a row.")
    return row


def _decode(file: LmdbFile, key: bytes) -> Any:
    """What the file has under ``key``: zlib and JSON, arrays of numbers decoded."""
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
        return json.loads(text, object_hook=_numbers)
    except DataError:
        raise
    except (zlib.error, ValueError, RecursionError) as error:
        raise DataError(f"{where} is damaged ({error}).") from None


def _numbers(item: dict[str, Any]) -> Any:
    """An encoded array of numbers as one; everything else as it is."""
    match item.get("__ndarray__"):
        case [list(shape), str(name), list(flat)] if name in _NUMBERS:
            try:
                return np.array(flat, name).reshape(shape)
            except (TypeError, OverflowError) as error:
                raise ValueError(str(error)) from None
    return item
