"""What the Snakemake rules of stores ask: changes of a spec, and the files it reads."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import SpecError
from pipeline.files.remote import is_url
from pipeline.spec.cache_spec import CacheSpec, load_spec
from pipeline.spec.sections import NO_REFERENCES, PER_ELEMENT

# Where one change ends and the next begins; values may have blanks themselves.
_BETWEEN = re.compile(r"\s+(?=[A-Za-z_][\w.]*=)")
# Of databases; opening one for reading changes it.
_LOCKS = ("-lock", ".lock", "-journal", "-shm", "-wal")


def spec_changes(config: Mapping[str, Any]) -> list[str]:
    """Changes ``key=value`` of the workflow's ``set``: a list, or text with blanks.

    Raises
    ------
    SpecError
        It is neither, or an item is no change.
    """
    found = config.get("set") or []
    if isinstance(found, str):
        found = _BETWEEN.split(found.strip())
    if not isinstance(found, list) or not all(isinstance(c, str) for c in found):
        raise SpecError(
            f"--config set={found!r} must be a list of changes, such as "
            "--config 'set=[\"splits.train.path=my data.xyz\"]'."
        )
    for change in found:
        if not re.match(r"[^=\s]+=", change):
            raise SpecError(
                f"--config set: {change!r} must look like key.subkey=value."
            )
    return found


def data_files(spec: Path, changes: Iterable[str]) -> list[str]:
    """Files on this machine that the store of ``spec`` is made of; none where unsure.

    A spec that cannot be read is left to the command, which says what is wrong with it.
    """
    try:
        chosen = load_spec(spec, changes)
    except SpecError:
        return []
    found: dict[str, None] = {}
    for path in _list_named(chosen):
        found |= dict.fromkeys(map(str, _files(path)))
    return list(found)


def _list_named(spec: CacheSpec) -> Iterator[str]:
    """Paths that a spec names, files and folders."""
    if spec.teacher is not None:
        yield from filter(None, (spec.teacher.checkpoint, spec.teacher.scale_file))
    for split in spec.splits.values():
        # One path now; several are a list.
        yield from [split.path] if isinstance(split.path, str) else split.path
        if split.reference_energies not in (PER_ELEMENT, NO_REFERENCES):
            yield split.reference_energies
        if split.ids is not None:
            yield split.ids


def _files(text: str) -> list[Path]:
    """The file, or the files of the folder or pattern, that ``text`` names."""
    if is_url(text):
        return []
    path = Path(text)
    if path.is_file():
        return [path]
    found = path.rglob("*") if path.is_dir() else _match_files(path)
    return sorted(f for f in found if f.is_file() and not f.name.endswith(_LOCKS))


def _match_files(path: Path) -> Iterable[Path]:
    """Files that a path with ``*`` or ``?`` in it stands for."""
    root = Path(path.anchor)
    pattern = str(path.relative_to(root))
    return root.glob(pattern) if re.search(r"[*?\[]", pattern) else ()
