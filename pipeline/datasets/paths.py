"""Files that a split's ``path`` names: one, several, those of a folder or of a glob."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.datasets.folders import list_entries
from pipeline.errors import DataError
from pipeline.files.globs import glob_matches, is_glob, sort_by_number

PACKED = (".xz", ".gz", ".bz2", ".zst")


def named_paths(names: Sequence[str]) -> tuple[Path, ...]:
    """What ``names`` stand for, globs expanded in counting order.

    Raises
    ------
    DataError
        A name stands for nothing, or two for the same file.
    """
    found = [path for name in names for path in _matches(name)]
    if len(names) > 1 or len(found) > 1:
        refuse_twins(found)
    return tuple(found)


def find_files(
    paths: Sequence[Path], suffixes: Sequence[str], packed: Sequence[str] = PACKED
) -> list[Path]:
    """Files of ``paths``; of folders those with ``suffixes``, in counting order.

    A folder without any may hold one folder that has them.

    Raises
    ------
    DataError
        A folder has none, or two are the same file, one of them packed.
    """
    wanted = tuple(s + ending for s in suffixes for ending in ("", *packed))
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        what = f"{' or '.join(suffixes)} files"
        files = list_entries(
            path, lambda file: file.name.lower().endswith(wanted), what
        )
        found += sort_by_number(files)
    if len(found) > 1:
        refuse_twins(found)
    return found


def refuse_twins(paths: Iterable[Path], endings: Sequence[str] = PACKED) -> None:
    """Raise DataError where two paths are one file, or differ by ``endings`` only."""
    seen: dict[str | tuple[int, int], Path] = {}
    for path in paths:
        name = str(path.resolve())
        for ending in endings:
            name = name.removesuffix(ending)
        keys: list[str | tuple[int, int]] = [name, *_inode(path)]
        for key in keys:
            if (other := seen.setdefault(key, path)) is not path:
                raise DataError(
                    f"{other} and {path} are the same file twice, so its samples would "
                    "count twice; name or keep one of them."
                )


def _inode(path: Path) -> list[tuple[int, int]]:
    """What hard links to a file have in common; nothing for a folder or no file."""
    if not path.is_file():
        return []
    status = path.stat()
    return [(status.st_dev, status.st_ino)]


def _matches(name: str) -> list[Path]:
    if not is_glob(name):
        return [Path(name)]
    found = glob_matches(name)
    if not found:
        raise DataError(f"{name} matches no file.")
    return found
