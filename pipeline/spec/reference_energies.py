"""Reference energies of elements, read from a file."""

import math
from pathlib import Path

from ase.data import atomic_numbers

from pipeline.errors import SpecError
from pipeline.spec.yaml_model import read_json_map, read_yaml


def read_reference_energies(path: Path) -> dict[int, float]:
    """Return the energy in eV by atomic number, read from a JSON or YAML map.

    The keys of the map are symbols or atomic numbers.

    Raises
    ------
    SpecError
        The file is not such a map, or names an element twice; names the wrong key.
    """
    energies: dict[int, float] = {}
    read = read_json_map if path.suffix == ".json" else read_yaml
    for element, energy in read(path).items():
        number = _atomic_number(element)
        if number is None:
            raise SpecError(f"{path}: {element!r} is not an element; write its symbol.")
        if number in energies:
            raise SpecError(
                f"{path}: {element!r} is in the file twice; remove one of the two."
            )
        if type(energy) not in (int, float) or not math.isfinite(energy):
            raise SpecError(
                f"{path}: {element!r} has the energy {energy!r}, which is not a "
                "number in eV."
            )
        energies[number] = float(energy)
    return energies


def _atomic_number(element: object) -> int | None:
    text = str(element)
    number = int(text) if text.isdecimal() else atomic_numbers.get(text, 0)
    return number if 1 <= number <= max(atomic_numbers.values()) else None
