"""Files of sample ids, one id a line: `kd-cache select` writes, ``ids:`` reads them."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.errors import SpecError
from pipeline.files.atomic import write_atomically

_COMMENT = "#"


def read_ids(path: Path, key: str) -> list[str]:
    """Return the ids of the file at ``path``, which ``key`` of a spec names.

    Empty lines and lines that begin with ``#`` are skipped, and so are blanks around an
    id.

    Raises
    ------
    SpecError
        The file cannot be read, has no id, or has an id twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise SpecError(f"{key}: {path} is not text; write one id a line.") from None
    except OSError as error:
        raise SpecError(
            f"{key}: {path} cannot be read ({error.strerror}); set it with --set "
            f"{key}=PATH."
        ) from None
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if not name or line.startswith(_COMMENT):
            continue
        if name in found:
            raise SpecError(
                f"{key}: {path} has the id {name!r} in lines {found[name]} and "
                f"{number}; remove one of the two."
            )
        found[name] = number
    if not found:
        raise SpecError(f"{key}: {path} has no id; write one id a line.")
    return list(found)


def write_ids(path: Path, ids: Iterable[str]) -> None:
    """Write ``ids`` atomically to ``path``, one id a line.

    Raises
    ------
    SpecError
        A line cannot hold an id, so that reading would give another id.
    """
    names = list(ids)
    for name in names:
        if name != name.strip() or "\n" in name or name.startswith(_COMMENT):
            raise SpecError(
                f"{path}: the id {name!r} cannot be a line of the file; give the "
                f"sample an id without line breaks, outer blanks and a leading "
                f"{_COMMENT!r}."
            )
    write_atomically(path, "".join(f"{name}\n" for name in names).encode())


def digest_ids(ids: Sequence[str]) -> str:
    """Return a hash of a set of ids, which no order changes."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()
