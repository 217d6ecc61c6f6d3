"""Folders of data files, also one folder further down."""

import logging
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import DataError

log = logging.getLogger("pipeline.datasets")


def list_entries(path: Path, is_data: Callable[[Path], bool], what: str) -> list[Path]:
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
    inside = _visible(path)
    if found := [entry for entry in inside if is_data(entry)]:
        return found
    deeper = {
        folder: entries
        for folder in inside
        if folder.is_dir()
        and (entries := [entry for entry in _visible(folder) if is_data(entry)])
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


def _visible(folder: Path) -> list[Path]:
    """Entries whose names do not begin with a dot, as shells list them."""
    return sorted(entry for entry in folder.iterdir() if entry.name[0] != ".")
