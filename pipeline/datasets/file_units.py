"""Units that a file itself states, checked against those that a split names."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.datasets.labels import ReadOptions
from pipeline.errors import DataError
from pipeline.spec.units import KINDS, Units

log = logging.getLogger("pipeline.datasets")


def reconcile_units(path: Path, stated: Units, split: Units, source: str) -> Units:
    """Return ``stated``, after a check that it says nothing else than the split.

    Parameters
    ----------
    stated
        What the file, or its layout, says.
    split
        What the split's ``units`` says.
    source
        Where ``stated`` is from, as it follows "by".

    Raises
    ------
    DataError
        The file names a unit that is unknown, or another one than the split.
    """
    if stated == Units():
        return stated
    factors = {}
    for part in KINDS:
        if (name := getattr(stated, part)) is not None:
            try:
                factors[part] = getattr(Units(**{part: name}).factors, part)
            except ValueError as error:
                raise DataError(
                    f"{path}: the unit of {part} by {source} cannot be used: {error}; "
                    "correct the file."
                ) from None
    chosen = split.over(stated).factors
    for part, factor in factors.items():
        if abs(getattr(chosen, part) / factor - 1) > 1e-6:
            raise DataError(
                f"{path}: the unit of {part} is {getattr(stated, part)!r} by "
                f"{source}, but the split's units: has another unit; remove one of "
                "the two."
            )
    log.info(
        "%s: by %s, %s",
        path,
        source,
        ", ".join(
            f"{part} is in {name}"
            for part in KINDS
            if (name := getattr(stated, part)) is not None
        ),
    )
    return stated


def metadata_units(path: Path, metadata: Any, options: ReadOptions) -> Units:
    """Units in the metadata of an ASE database, as schnetpack and nablaDFT write them.

    They are those of values in ``data``, where the split takes its labels from there,
    and of lengths. Energies, forces and stresses
    that ASE itself keeps are in eV, eV/Å and eV/Å³.

    Raises
    ------
    DataError
        A unit is no text or unknown, or the split names another one.
    """
    if not isinstance(metadata, Mapping):
        return Units()
    named = metadata.get("_property_unit_dict")
    named = named if isinstance(named, Mapping) else {}
    energy, forces = options.energy_key, options.gradient_key or options.forces_key
    stated = Units(
        energy=_text(path, named, energy),
        length=_text(path, metadata, "_distance_unit"),
        forces=_text(path, named, forces),
        stress=_text(path, named, options.stress_key),
    )
    if forces is None and stated != Units():
        stated = replace(stated, forces="eV/Å")
    found = reconcile_units(path, stated, options.units, "its metadata")
    if stated == Units() or options.stress_key is not None:
        return found
    return replace(found, stress="eV/Å³")


def _text(path: Path, units: Mapping[str, Any], key: str | None) -> str | None:
    """The unit under ``key``, which may begin with ``data.``; None if not stated."""
    if key is None:
        return None
    unit = units.get(key.removeprefix("data."))
    if unit is None or isinstance(unit, str):
        return unit or None
    raise DataError(f"{path}: its metadata has the unit {unit!r} of {key}, not a name.")
