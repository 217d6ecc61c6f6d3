"""Folders of data files: which hold data, one folder further down, and copies."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pipeline.errors import DataError

log = logging.getLogger("pipeline.datasets")


def entries_of(path: Path, is_data: Callable[[Path], bool], what: str) -> list[Path]:
    """Entries of the folder for which ``is_data`` holds, in the order of their names.

    An archive often unpacks to a folder in a folder. Where ``path`` holds no data and
    exactly one of its folders does, that one is read.

    Parameters
    ----------
    what
        Name of the entries that are looked for, as it follows "holds no".

    Raises
    ------
    DataError
        The folder does not exist, holds no data, or several folders in it do.
    """
    if not path.is_dir():
        raise DataError(f"{path} does not exist.")
    inside = sorted(path.iterdir())
    if found := [entry for entry in inside if is_data(entry)]:
        return found
    deeper = {
        folder: entries
        for folder in inside
        if folder.is_dir()
        and (entries := [entry for entry in sorted(folder.iterdir()) if is_data(entry)])
    }
    if not deeper:
        raise DataError(f"{path} holds no {what}.")
    if len(deeper) > 1:
        names = ", ".join(folder.name for folder in deeper)
        raise DataError(
            f"{path} holds no {what}, but several of its folders do ({names}); name "
            "the one that is meant."
        )
    (folder, entries) = deeper.popitem()
    log.info("%s is read, since %s itself holds no data files", folder, path)
    return entries


def refuse_copies(files: Iterable[Path], endings: Sequence[str]) -> None:
    """Raise DataError where two files have one name but for ``endings``, or are one.

    A packed file beside its unpacked copy would give every sample twice.
    """
    names: dict[str, Path] = {}
    places: dict[Path, Path] = {}
    for file in files:
        stem = _without(str(file), endings)
        place = file.resolve()
        other = names.get(stem, places.get(place))
        if other is not None:
            raise DataError(
                f"{other} and {file} seem to hold the same samples; remove one of them."
            )
        names[stem] = places[place] = file


def _without(name: str, endings: Sequence[str]) -> str:
    """Return ``name`` without the endings, each taken off once in their order."""
    for ending in endings:
        name = name.removesuffix(ending)
    return name
