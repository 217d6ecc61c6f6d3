"""The atoms of an extended-XYZ frame: rows of the columns that ``Properties`` names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from ase.data import atomic_numbers

from pipeline.datasets.headers import Malformed
from pipeline.datasets.numerals import flags, parse_number, reals

DEFAULT = "species:S:1:pos:R:3"
# Names of columns by what this project calls them; ASE and GPUMD read the same.
_ROLES = {
    "species": "species",
    "symbols": "species",
    "z": "numbers",
    "numbers": "numbers",
    "pos": "positions",
    "positions": "positions",
    "tags": "tags",
    "fixed": "fixed",
    "move_mask": "move_mask",
}
_WIDTHS = {"positions": (3,), "move_mask": (1, 3)}
# An element with the number of its atom or its charge: O1, O2-, Fe3+.
_LABELLED = re.compile(r"([A-Z][a-z]?)[0-9]*[+-]?[0-9]*")
_HYDROGENS = {"D": 1, "T": 1}


@dataclass(frozen=True, slots=True)
class Column:
    """One property of all atoms: its type letter and where it is in a row."""

    name: str
    letter: str
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """Columns of a row: those with a role by it, the others by their names."""

    roles: dict[str, Column]
    others: list[Column]
    width: int


@lru_cache(maxsize=256)
def parse_layout(properties: str) -> Layout:
    """What ``Properties`` says of the columns.

    Raises
    ------
    Malformed
        It is torn, repeats a column, or has no elements or no positions.
    """
    parts = properties.strip().split(":")
    if len(parts) % 3:
        raise Malformed(f"Properties={properties!r} is not name:type:columns:…")
    roles: dict[str, Column] = {}
    others: list[Column] = []
    at = 0
    for name, letter, count in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        if letter.upper() not in tuple("SRIL") or not _is_count(count):
            raise Malformed(f"Properties has {name}:{letter}:{count}")
        column = Column(name, letter.upper(), at, at := at + int(count))
        role = _ROLES.get(name.lower())
        if role in roles or name in [other.name for other in others]:
            raise Malformed(f"Properties has the column {name!r} twice")
        if role is None:
            others.append(column)
        elif int(count) in _WIDTHS.get(role, (1,)):
            roles[role] = column
        else:
            raise Malformed(f"Properties has {name!r} with {count} numbers per atom")
    _check_roles(roles, properties)
    return Layout(roles, others, at)


def split_rows(lines: Sequence[str], layout: Layout, declared: bool) -> list[list[str]]:
    """The words of every row; raises Malformed where they are too many or too few.

    ``declared`` says whether the layout is the frame's own.
    """
    rows = [line.split() for line in lines]
    for number, row in enumerate(rows):
        if len(row) != layout.width:
            reason = f"Properties declares {layout.width}"
            if not declared:
                reason = "a frame without Properties has an element and x, y, z"
            raise Malformed(f"atom {number} has {len(row)} columns, but {reason}")
    return rows


def column_values(rows: Sequence[Sequence[str]], column: Column) -> Any:
    """Numbers (n,) or (n, c) of a column; its words where they are no numbers."""
    width = column.stop - column.start
    words = [word for row in rows for word in row[column.start : column.stop]]
    if column.letter == "S":
        return words if width == 1 else [words[i::width] for i in range(width)]
    try:
        values: npt.NDArray[Any]
        values = flags(words) if column.letter == "L" else reals(words)
    except ValueError:
        return words
    return values if width == 1 else values.reshape(-1, width)


def parse_numbers(rows: Sequence[Sequence[str]], column: Column) -> npt.NDArray[Any]:
    """Numbers of a column that must have them; raises Malformed."""
    words = [word for row in rows for word in row[column.start : column.stop]]
    try:
        values = reals(words)
    except ValueError as error:
        raise Malformed(f"the column {column.name!r}: {error}") from None
    width = column.stop - column.start
    return values if width == 1 else values.reshape(-1, width)


def parse_flags(rows: Sequence[Sequence[str]], column: Column) -> npt.NDArray[np.bool_]:
    """Flags of a column, (n, c); raises Malformed where there is anything else."""
    words = [word for row in rows for word in row[column.start : column.stop]]
    try:
        values = flags(words)
    except ValueError as error:
        raise Malformed(f"the column {column.name!r}: {error}") from None
    return values.reshape(len(rows), -1)


def parse_elements(rows: Sequence[Sequence[str]], column: Column) -> list[int]:
    """Atomic numbers of a column of elements; raises Malformed."""
    return [_element(row[column.start]) for row in rows]


@lru_cache(maxsize=1024)
def _element(text: str) -> int:
    word = text.capitalize()
    if word in _HYDROGENS:
        return _HYDROGENS[word]
    if word in atomic_numbers:
        return atomic_numbers[word]
    if isinstance(number := parse_number(text), int):
        return number
    match = _LABELLED.fullmatch(text)
    if match is not None and match.group(1) in atomic_numbers:
        return atomic_numbers[match.group(1)]
    raise Malformed(f"{text!r} is no element")


def _is_count(text: str) -> bool:
    return text.isdecimal() and 0 < int(text) < 10000


def _check_roles(roles: dict[str, Column], properties: str) -> None:
    if "positions" not in roles:
        raise Malformed(f"Properties={properties!r} has no column 'pos'")
    if "species" not in roles and "numbers" not in roles:
        raise Malformed(f"Properties={properties!r} has no column 'species' and no 'Z'")
