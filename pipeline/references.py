"""Reference energies of elements, read from a file."""

import json
import math
from pathlib import Path
from typing import Any

from pipeline.documents import read_yaml
from pipeline.errors import SpecError


def read_reference_energies(path: Path) -> dict[int, float]:
    """Energy in eV by atomic number, of a JSON or YAML map from element to eV.

    Raises
    ------
    SpecError
        The file is no such map; names the key that is wrong.
    """
    energies = {}
    for element, energy in _read_map(path).items():
        number = _atomic_number(element)
        if number is None:
            # YAML reads the symbol of nobelium, No, as false.
            raise SpecError(f"{path}: {element!r} is no element; quote its symbol.")
        if type(energy) not in (int, float) or not math.isfinite(energy):
            raise SpecError(
                f"{path}: {element!r} needs a number in eV, not {energy!r}."
            )
        energies[number] = float(energy)
    return energies


def _read_map(path: Path) -> dict[str, Any]:
    if path.suffix != ".json":
        return read_yaml(path)
    try:
        loaded = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"{path} cannot be read as JSON ({error}).") from None
    if not isinstance(loaded, dict):
        raise SpecError(f"{path} must hold a map from element to eV.")
    return loaded


def _atomic_number(element: object) -> int | None:
    from ase.data import atomic_numbers

    text = str(element)
    number = int(text) if text.isdecimal() else atomic_numbers.get(text, 0)
    return number if 1 <= number <= max(atomic_numbers.values()) else None
