"""Rows of ASE databases, as plain dictionaries, to samples."""

import json
from typing import Any

from pipeline.datasets.constraints import find_held_atoms
from pipeline.datasets.labels import Record
from pipeline.datasets.samples import id_text, pair_id
from pipeline.errors import DataError

NO_CELL = ((0.0,) * 3,) * 3
NO_PBC = (False,) * 3
_STRUCTURE = {"numbers", "positions", "cell", "pbc", "tags", "constraints"}
_STRUCTURE |= {"key_value_pairs", "data"}


def row_id(row: dict[str, Any], where: str) -> str | None:
    """Id in the row's data or key-value pairs: ``sample_id``, else ``{sid}_{fid}``.

    Raises
    ------
    DataError
        A part of the id is neither a number nor text that can be written as UTF-8.
    """
    words: dict[str, Any] = {}
    for part in ("key_value_pairs", "data"):
        extra = row.get(part)
        if isinstance(extra, dict):
            words |= extra
    plain = {
        name: id_text(words[name], name, where)
        for name in ("sample_id", "sid", "fid")
        if words.get(name) is not None
    }
    if "sample_id" in plain:
        return plain["sample_id"]
    return pair_id(plain.get("sid"), plain.get("fid"))


def lost_constraints(row: dict[str, Any]) -> tuple[str, ...]:
    """Names of the row's constraints that its sample cannot have; none if damaged."""
    try:
        return find_held_atoms(_constraints(row), len(row["numbers"]))[1]
    except (KeyError, IndexError, TypeError, ValueError):
        # Whoever reads the row names it.
        return ()


def _constraints(row: dict[str, Any]) -> Any:
    """The row's constraints as dictionaries; some files keep them as JSON."""
    found = row.get("constraints") or []
    return json.loads(found) if isinstance(found, str) else found


def row_record(row: dict[str, Any], where: str) -> Record:
    """The row, unchecked; constraints fix atoms and leave the forces alone.

    Raises
    ------
    DataError
        The row lacks numbers or positions, or has constraints that make no sense.
    """
    for name in ("numbers", "positions"):
        if name not in row:
            raise DataError(f"{where} has no {name}.")
    try:
        fixed, lost = find_held_atoms(_constraints(row), len(row["numbers"]))
    except (KeyError, IndexError, TypeError, ValueError):
        raise DataError(f"{where} has constraints that cannot be read.") from None
    return Record(
        atomic_numbers=row["numbers"],
        positions=row["positions"],
        cell=row.get("cell", NO_CELL),
        pbc=row.get("pbc", NO_PBC),
        tags=row.get("tags"),
        fixed=fixed,
        lost=lost,
        properties=_properties(row),
    )


def _properties(row: dict[str, Any]) -> dict[str, Any]:
    """All other values of the row; those of its parts also dotted (``data.energy``)."""
    found = {name: value for name, value in row.items() if name not in _STRUCTURE}
    for part in ("key_value_pairs", "data"):
        extra = row.get(part)
        if isinstance(extra, dict):
            found |= {f"{part}.{name}": value for name, value in extra.items()}
    pairs = row.get("key_value_pairs")
    return (pairs | found) if isinstance(pairs, dict) else found
