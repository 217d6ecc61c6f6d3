"""The frames that a split's ``where`` chooses by their values, and ``ids`` by ids."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.datasets.labels import Condition, find
from pipeline.errors import DataError

_NAMED = 8
# What stands for the value of a key that a frame lacks; no value equals it.
ABSENT = None


def look_up(
    properties: Mapping[str, Any], where: Sequence[Condition]
) -> tuple[Any, ...]:
    """A frame's own values under the keys of ``where``; ABSENT where it has none."""
    found = (find(properties, key) for key, _ in where)
    return tuple(ABSENT if item is None else _plain(item[1]) for item in found)


def select_matching(
    path: str, where: Sequence[Condition], rows: Sequence[tuple[Any, ...]]
) -> list[int]:
    """Numbers of the frames, whose values are ``rows``, that meet every condition.

    Raises
    ------
    DataError
        No frame has one of the keys, or none meets all conditions.
    """
    for column, (key, _) in enumerate(where):
        if all(row[column] is ABSENT for row in rows):
            raise DataError(f"{path}: no frame has the key {key!r} of where:.")
    chosen = [number for number, row in enumerate(rows) if meets(row, where)]
    if not chosen:
        raise DataError(f"{path}: where: selects no frame; {_values(where, rows)}.")
    return chosen


def select_ids(
    path: str, ids: Sequence[str], wanted: Collection[str], file: str
) -> list[int]:
    """Return the numbers of the samples, whose ids are ``ids``, that are ``wanted``.

    ``file`` names the wanted ids.

    Raises
    ------
    DataError
        No sample has some wanted id; counts these ids and names the first.
    """
    known = frozenset(ids)
    missing = [name for name in wanted if name not in known]
    if missing:
        raise DataError(
            f"{path} lacks {len(missing)} of the {len(wanted)} ids in {file}, the "
            f"first is {missing[0]!r}; ids: chooses among the samples that where, "
            "offset, every and limit leave."
        )
    chosen = frozenset(wanted)
    return [number for number, name in enumerate(ids) if name in chosen]


def meets(row: tuple[Any, ...], where: Sequence[Condition]) -> bool:
    """Whether a frame with the values ``row`` meets every condition."""
    return all(
        any(_equal(value, one) for one in wanted)
        for value, (_, wanted) in zip(row, where, strict=True)
    )


def _equal(value: Any, wanted: Any) -> bool:
    """Numbers as numbers, text as text; databases keep true and false as 1 and 0."""
    if isinstance(value, str) or isinstance(wanted, str):
        return isinstance(value, str) and bool(value == wanted)
    return isinstance(value, bool | int | float) and bool(value == wanted)


def _plain(value: Any) -> Any:
    """A value as Python's own; text where it is no single number, word or flag."""
    if isinstance(value, np.ndarray | np.generic) and value.size == 1:
        value = value.reshape(()).item()
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return value if isinstance(value, bool | int | float | str) else repr(value)[:80]


def _shown(value: Any) -> str:
    return "absent" if value is ABSENT else repr(value)


def _values(where: Sequence[Condition], rows: Sequence[tuple[Any, ...]]) -> str:
    """The values that frames do have, in a few words."""
    parts = []
    for column, (key, wanted) in enumerate(where):
        known = list(dict.fromkeys(_shown(row[column]) for row in rows[:1000]))
        more = ", …" if len(known) > _NAMED else ""
        meant = " or ".join(map(repr, wanted))
        parts.append(f"{key} is {', '.join(known[:_NAMED])}{more}, not {meant}")
    return "; ".join(parts)
