"""The file ``system.txt`` of OC20's per-adsorbate sets: a reference for each system."""

import logging
import math
from functools import lru_cache
from pathlib import Path

from pipeline.datasets.frames import read_unpacked
from pipeline.datasets.paths import PACKED
from pipeline.errors import DataError

log = logging.getLogger("pipeline.datasets")


def find_systems(frames: Path) -> Path | None:
    """Return the ``system.txt`` in the folder of a file of frames, if there is one."""
    for packed in ("", *PACKED):
        file = frames.with_name(f"system.txt{packed}")
        if file.is_file():
            return file
    return None


def system_reference(systems: Path, name: str) -> float | None:
    """Reference energy in eV of the system ``name``, or None where it has no line.

    Raises
    ------
    DataError
        The file cannot be read.
    """
    status = systems.stat()
    return _references(systems, status.st_mtime_ns, status.st_size).get(name)


@lru_cache(maxsize=8)
def _references(systems: Path, _changed: int, _size: int) -> dict[str, float]:
    """Energies by system; warns of lines that are not ``system,energy``.

    Raises
    ------
    DataError
        A system has two energies.
    """
    found: dict[str, float] = {}
    wrong = 0
    lines = read_unpacked(systems).decode(errors="replace").splitlines()
    for line in filter(str.strip, lines):
        name, _, text = line.partition(",")
        try:
            energy = float(text)
        except ValueError:
            energy = math.nan
        if math.isfinite(energy):
            if found.setdefault(name.strip(), energy) != energy:
                raise DataError(
                    f"{systems} has two energies for the system {name.strip()!r}; "
                    "remove the one that is not meant."
                )
        else:
            wrong += 1
    if wrong:
        log.warning(
            "%s: %d of %d lines are not system,energy and are ignored",
            systems,
            wrong,
            len(found) + wrong,
        )
    return found
