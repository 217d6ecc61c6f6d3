"""Finds the reader of a dataset format: a built-in one or that of a plug-in."""

from functools import cache
from pkgutil import resolve_name

from pipeline.datasets.base import IndexedDataset
from pipeline.spec.formats import BUILT_IN, FORMATS


@cache
def load_reader(format: str) -> type[IndexedDataset]:
    """Import the class that reads datasets of ``format``.

    Raises
    ------
    SpecError
        There is no such format, its plug-in cannot be imported, or the class of the
        plug-in breaks the contract of a reader.
    """
    if format in BUILT_IN:
        FORMATS.check(format)
        built_in: type[IndexedDataset] = resolve_name(BUILT_IN[format])
        return built_in
    found = FORMATS.load(format)
    if (reason := _violation(format, found)) is not None:
        raise FORMATS.refuse(format, reason)
    reader: type[IndexedDataset] = found
    return reader


def format_of_suffix(suffix: str, *, plugins: bool = False) -> str | None:
    """Return the format of files that end in ``suffix``; None if no reader has it.

    Built-in formats are asked, or only those of ``plugins``. A suffix that several
    plug-ins have tells no format.
    """
    formats = FORMATS.installed() if plugins else tuple(BUILT_IN)
    found = [name for name in formats if suffix in load_reader(name).suffixes]
    return found[0] if len(found) == 1 else None


def _violation(format: str, found: object) -> str | None:
    """Return how ``found`` breaks the contract of a reader; None if it keeps it."""
    if not (isinstance(found, type) and issubclass(found, IndexedDataset)):
        return "is not a subclass of pipeline.datasets.base.IndexedDataset"
    if getattr(found, "format", None) != format:
        own = getattr(found, "format", None)
        return f"has format = {own!r}, not its entry point's"
    suffixes = found.suffixes
    if not isinstance(suffixes, tuple) or not all(
        isinstance(suffix, str) and suffix.startswith(".") for suffix in suffixes
    ):
        return f"has suffixes = {suffixes!r}, not a tuple of texts such as ('.csv',)"
    return None
