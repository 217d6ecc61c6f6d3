"""One frame of extended XYZ, from its text to a record."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.datasets.columns import (
    DEFAULT,
    Layout,
    column_values,
    parse_elements,
    parse_flags,
    parse_layout,
    parse_numbers,
    split_rows,
)
from pipeline.datasets.constraints import is_constraint_like
from pipeline.datasets.headers import Malformed, Word, header_words, parse_word
from pipeline.datasets.labels import Record, find, is_label_like
from pipeline.datasets.numerals import flags, reals
from pipeline.datasets.samples import pair_id
from pipeline.errors import DataError

_SEPARATORS = re.compile(r"[\s,]+")
_CELL_LIKE = re.compile(r"latt|cell|box|^vec(tor)?_?[a-c1-3]$|^abc$|^tv_?[1-3]?$", re.I)
_LENGTH_LIKE = re.compile(r"(cell|box|lattice)_?(length|size|edge|const(ant)?)s?", re.I)
_PBC_LIKE = re.compile(r"pbcs|periodic(ity|_?bound\w*)?|bound(ary|aries)\w*", re.I)
_STRUCTURE = {"lattice", "cell", "properties", "pbc"}
_IDS = ("sample_id", "sid", "fid")


@dataclass(frozen=True)
class FrameText:
    """A frame whose header is read and whose atoms are not.

    ``place`` names file and frame, as it begins the sentence of an error.
    """

    place: str
    words: Mapping[str, Word]
    rows: Sequence[str]

    @classmethod
    def of(cls, path: Path, text: bytes, number: int) -> "FrameText":
        """The frame ``text``, counted as ``number`` in its file or files.

        Raises
        ------
        DataError
            Its header cannot be read; names the file and the number.
        """
        place = f"{path}: sample {number}"
        try:
            # Not splitlines, which parts lines at characters of text, too.
            _, header, *rows = text.decode().split("\n")
        except UnicodeDecodeError as error:
            raise _unreadable(place, f"it is not UTF-8: {error.reason}") from None
        try:
            while rows and not rows[-1].strip():
                rows.pop()
            return cls(place, header_words(header.strip()), rows)
        except Malformed as error:
            raise _unreadable(place, str(error)) from None

    @property
    def sample_id(self) -> str | None:
        """``sample_id``, else ``sid`` with ``fid``, as they are written, else None."""
        found = {name: find(self.words, name) for name in _IDS}
        texts = {name: item[1].text for name, item in found.items() if item is not None}
        if texts.get("sample_id"):
            return texts["sample_id"]
        if texts.get("sid") and texts.get("fid"):
            return pair_id(texts["sid"], texts["fid"])
        return None

    @property
    def header(self) -> dict[str, Any]:
        """Values of the header by their keys."""
        return {key: parse_word(word) for key, word in self.words.items()}

    def record(self) -> Record:
        """All that the frame has.

        Raises
        ------
        DataError
            Its cell, columns or atoms cannot be read; names file and frame.
        """
        try:
            return _record(self.words, self.rows)
        except Malformed as error:
            raise _unreadable(self.place, str(error)) from None


def _record(words: Mapping[str, Word], lines: Sequence[str]) -> Record:
    text = _text(words, "properties")
    layout = parse_layout(DEFAULT if text is None else text)
    rows = split_rows(lines, layout, declared=text is not None)
    cell = _cell(words)
    return Record(
        atomic_numbers=_elements(rows, layout),
        positions=parse_numbers(rows, layout.roles["positions"]),
        cell=np.zeros((3, 3)) if cell is None else cell,
        pbc=_pbc(words, cell is not None),
        tags=parse_numbers(rows, tags) if (tags := layout.roles.get("tags")) else None,
        fixed=_read_fixed(rows, layout),
        lost=_not_kept(rows, layout),
        properties=_properties(words, rows, layout),
    )


def _properties(
    words: Mapping[str, Word], rows: Sequence[Sequence[str]], layout: Layout
) -> dict[str, Any]:
    """Values of the header and of all columns that are no part of the structure."""
    found = {
        key: parse_word(word)
        for key, word in words.items()
        if key.lower() not in _STRUCTURE
    }
    for column in layout.others:
        if column.name in found and is_label_like(column.name):
            raise Malformed(f"{column.name!r} is both in its header and a column")
        found[column.name] = column_values(rows, column)
    return found


def _elements(rows: Sequence[Sequence[str]], layout: Layout) -> npt.NDArray[Any]:
    if (column := layout.roles.get("numbers")) is None:
        return np.array(parse_elements(rows, layout.roles["species"]))
    numbers = parse_numbers(rows, column)
    species = layout.roles.get("species")
    if species is not None and not np.array_equal(
        parse_elements(rows, species), numbers
    ):
        raise Malformed(f"the columns {species.name!r} and {column.name!r} disagree")
    return numbers


def _read_fixed(
    rows: Sequence[Sequence[str]], layout: Layout
) -> npt.NDArray[np.bool_] | None:
    """Atoms that are held on all axes; None where no column says."""
    masks: list[npt.NDArray[np.bool_]] = []
    if (column := layout.roles.get("fixed")) is not None:
        masks.append(parse_flags(rows, column)[:, 0])
    if (column := layout.roles.get("move_mask")) is not None:
        free = parse_flags(rows, column).sum(axis=1)
        masks.append(np.equal(free, 0))
    if len(masks) == 2 and not np.array_equal(masks[0], masks[1]):
        raise Malformed("the columns 'fixed' and 'move_mask' disagree")
    return masks[0] if masks else None


def _not_kept(rows: Sequence[Sequence[str]], layout: Layout) -> tuple[str, ...]:
    """Names of a mask that holds an atom on some axes only, and of unknown masks."""
    lost = [c.name for c in layout.others if is_constraint_like(c.name)]
    if (column := layout.roles.get("move_mask")) is not None:
        free = parse_flags(rows, column)
        if (free.any(axis=1) & ~free.all(axis=1)).any():
            lost.append(column.name)
    return tuple(lost)


def _cell(words: Mapping[str, Word]) -> npt.NDArray[np.float64] | None:
    """Vectors of the cell as rows, (3, 3); None where there is none."""
    cells = {
        key: _vectors(key, word)
        for key, word in words.items()
        if key.lower() in ("lattice", "cell")
    }
    if not cells:
        _refuse_other_cells(words)
        return None
    first, *others = cells.values()
    if not all(np.array_equal(other, first) for other in others):
        raise Malformed(f"{' and '.join(map(repr, cells))} are different cells")
    return first


def _vectors(key: str, word: Word) -> npt.NDArray[np.float64]:
    parts = [part for part in _SEPARATORS.split(word.text or "") if part]
    if len(parts) != 9:
        raise Malformed(f"{key!r} has {len(parts)} values, where a cell has 9 numbers")
    try:
        vectors = reals(parts).reshape(3, 3)
    except ValueError as error:
        raise Malformed(f"{key!r}: {error}") from None
    if word.nested and not np.array_equal(vectors, vectors.T):
        raise Malformed(
            f"{key!r} is a nested array, whose rows may or may not be the vectors of "
            "the cell; write nine numbers in quotes"
        )
    return vectors


def _refuse_other_cells(words: Mapping[str, Word]) -> None:
    for key, word in words.items():
        many = _CELL_LIKE.search(key) and np.size(parse_word(word)) in (3, 6, 9)
        if many or _LENGTH_LIKE.fullmatch(key):
            raise Malformed(
                f"it has {key!r} but no 'Lattice'; write a cell as nine numbers under "
                "that name, or remove the key"
            )


def _pbc(words: Mapping[str, Word], in_cell: bool) -> npt.NDArray[np.bool_]:
    """Periodic directions, (3,); all of a frame with a cell that says nothing."""
    text = _text(words, "pbc")
    if text is None:
        _refuse_other_pbc(words)
        return np.full(3, in_cell)
    parts = [part for part in _SEPARATORS.split(text) if part]
    try:
        found = flags(parts)
    except ValueError as error:
        raise Malformed(f"pbc: {error}") from None
    if len(found) not in (1, 3):
        raise Malformed(f"pbc has {len(found)} values, expected 3")
    return np.broadcast_to(found, 3)


def _refuse_other_pbc(words: Mapping[str, Word]) -> None:
    for key, word in words.items():
        if word.text is not None and _PBC_LIKE.fullmatch(key):
            raise Malformed(
                f"it has {key!r} but no 'pbc'; write the periodic directions under "
                'that name, as in pbc="T T F", or remove the key'
            )


def _text(words: Mapping[str, Word], name: str) -> str | None:
    """The value of a key in any case; None where it is not there."""
    found = [word for key, word in words.items() if key.lower() == name]
    if not found:
        return None
    if len({word.text for word in found}) > 1:
        raise Malformed(f"it has {name!r} twice, in upper and lower case")
    if not found[0].text:
        raise Malformed(f"{name!r} has no value")
    return found[0].text


def _unreadable(place: str, reason: str) -> DataError:
    return DataError(f"{place} cannot be read as extended XYZ: {reason}.")
