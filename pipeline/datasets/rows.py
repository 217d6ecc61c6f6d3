"""Rows of ASE databases, as plain dictionaries, to samples."""

from typing import Any

from pipeline.datasets.labels import Record
from pipeline.datasets.samples import fixed_atoms, pair_id
from pipeline.errors import DataError

NO_CELL = ((0.0,) * 3,) * 3
NO_PBC = (False,) * 3
_STRUCTURE = {"numbers", "positions", "cell", "pbc", "tags", "constraints"}
_STRUCTURE |= {"key_value_pairs", "data"}


def row_id(row: dict[str, Any]) -> str | None:
    """Id in the row's data or key-value pairs: ``sample_id``, else ``{sid}_{fid}``."""
    words: dict[str, Any] = {}
    for part in ("key_value_pairs", "data"):
        extra = row.get(part)
        if isinstance(extra, dict):
            words |= extra
    if "sample_id" in words:
        return str(words["sample_id"])
    return pair_id(words.get("sid"), words.get("fid"))


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
        fixed = fixed_atoms(row.get("constraints") or [], len(row["numbers"]))
    except (KeyError, IndexError, TypeError, ValueError):
        raise DataError(f"{where} has constraints that cannot be read.") from None
    return Record(
        atomic_numbers=row["numbers"],
        positions=row["positions"],
        cell=row.get("cell", NO_CELL),
        pbc=row.get("pbc", NO_PBC),
        tags=row.get("tags"),
        fixed=fixed,
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
