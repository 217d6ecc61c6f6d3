"""Which values of a frame are its labels, by the names and units that a split gives."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.datasets.samples import Fields, make_sample
from pipeline.datasets.virials import StrainLabel, has_components, sample_virial
from pipeline.errors import DataError, SpecError
from pipeline.spec.units import Factors, Units
from pipeline.structure import Sample

if TYPE_CHECKING:
    from pipeline.datasets.base import Dataset

log = logging.getLogger("pipeline.datasets")
Value = TypeVar("Value")
Scalar = bool | int | float | str
# A key and the values of it that are wanted.
Condition = tuple[str, tuple[Scalar, ...]]
# Parts of names that are like a label's, and whole names: those of OC20's LMDBs, of
# quantum chemistry and of MD17.
_STEMS = {
    "energy": ("energ", "etot", "toten"),
    "forces": ("forc", "grad"),
    "virial": ("virial", "stress"),
}
_WHOLE = {
    "energy": {"y", "y_init", "y_relaxed", "e", "u", "u0", "scf"},
    "forces": {"f", "fx", "fy", "fz", "de_dr", "dedr"},
    "virial": set[str](),
}
_PER_ATOM = re.compile(r"per[_-]?atom|/atom", re.I)
_NAMED = 8
# What `virial_key` says if neither stresses nor virials are to be read.
NO_KEY = "none"
_VIRIALS, _STRESSES = ("virial", "virials"), ("stress",)
# Labels under two names are the same if they agree as single precision does.
_SINGLE = 1e-5


@dataclass(frozen=True)
class ReadOptions:
    """What a split says of how its frames are to be read.

    ``gradient_key`` names the gradient of the energy: forces are its negative.
    ``where`` are conditions that a frame must meet. With ``keep_bad`` a frame that
    cannot be read is listed, and refused when it is asked for. If one of ``virial_key``
    and ``stress_key`` is given, only what it names is read; a ``virial_key`` of
    ``none`` names nothing.

    Raises
    ------
    SpecError
        ``energy_key`` looks like that of an energy per atom.
    """

    energy_key: str | None = None
    forces_key: str | None = None
    gradient_key: str | None = None
    units: Units = field(default_factory=Units)
    where: tuple[Condition, ...] = ()
    keep_bad: bool = False
    virial_key: str | None = None
    stress_key: str | None = None

    def __post_init__(self) -> None:
        if self.energy_key is not None and is_per_atom(self.energy_key):
            raise SpecError(
                f"energy_key is {self.energy_key!r}, which looks like an energy per "
                "atom; a sample needs the energy of all its atoms together, so write "
                "that into the file and name it."
            )


@dataclass(frozen=True)
class Record:
    """What a source has of one frame, unchecked and in the units of the file.

    ``lost`` are names of constraints that ``fixed`` does not express.
    ``properties`` are all other values by name, nested ones dotted (``data.energy``).
    ``energy_names`` and ``forces_names`` are looked for in their order if a split
    names no key. ``units`` are what the file itself says.
    """

    atomic_numbers: Any
    positions: Any
    cell: Any
    pbc: Any
    tags: Any = None
    fixed: Any = None
    lost: tuple[str, ...] = ()
    properties: Mapping[str, Any] = field(default_factory=dict)
    energy_names: tuple[str, ...] = ("energy",)
    forces_names: tuple[str, ...] = ("forces", "force")
    units: Units = field(default_factory=Units)


def find(properties: Mapping[str, Value], name: str) -> tuple[str, Value] | None:
    """Name and value under ``name``, or under the one that differs in case only."""
    if name in properties:
        return name, properties[name]
    alike = [known for known in properties if known.lower() == name.lower()]
    return (alike[0], properties[alike[0]]) if len(alike) == 1 else None


def record_sample(
    sample_id: str, record: Record, options: ReadOptions, where: str
) -> Sample:
    """``record`` as a sample in eV and Å, with the labels that ``options`` name.

    Parameters
    ----------
    where
        File and sample, as they begin the sentence of an error.

    Raises
    ------
    DataError
        A value is impossible, or a label is there twice with different values; names
        it.
    """
    for names, key in _searches(record, options):
        _refuse_two(record.properties, names, key, where)
    energy, forces = _labels(record, options)
    factors = options.units.over(record.units).factors
    sign = 1.0 if options.gradient_key is None else -1.0
    fields = Fields(
        atomic_numbers=record.atomic_numbers,
        positions=record.positions,
        cell=record.cell,
        pbc=record.pbc,
        tags=record.tags,
        fixed=record.fixed,
        energy=None if energy is None else energy[1],
        forces=None if forces is None else forces[1],
        energy_factor=factors.energy,
        length_factor=factors.length,
        forces_factor=sign * factors.forces,
    )
    sample = make_sample(sample_id, fields, where)
    virial, stress = _strain_labels(record, options, factors)
    if virial is None and stress is None:
        return sample
    found = sample_virial(sample.structure, virial, stress, where)
    return replace(sample, virial=found)


def label_like(record: Record, options: ReadOptions) -> list[str]:
    """Names in ``record`` that look like labels, other than those in use, sorted."""
    labels = (*_labels(record, options), *_find_strain_labels(record, options))
    used = {found[0] for found in labels if found is not None}
    return sorted(
        name for name in record.properties if name not in used and is_label_like(name)
    )


def is_label_like(name: str) -> bool:
    """Whether ``name`` looks like that of an energy, forces, a virial or a stress."""
    return any(is_like(name, label) for label in _STEMS)


def is_like(name: str, label: str) -> bool:
    """Whether ``name`` looks like that of ``label``: energy, forces or virial."""
    # Values inside others have dots before their names.
    word = name.lower().rpartition("data.")[2]
    return word in _WHOLE[label] or any(stem in word for stem in _STEMS[label])


def is_per_atom(name: str) -> bool:
    """Whether ``name`` looks like that of an energy divided by the number of atoms."""
    return _PER_ATOM.search(name) is not None


def report_missing_labels(
    where: str,
    dataset: "Dataset",
    no_energy: npt.NDArray[np.bool_],
    no_forces: npt.NDArray[np.bool_],
    no_virial: npt.NDArray[np.bool_],
) -> None:
    """Log how many samples have no energy or no forces, and the names they do have.

    Virials are missed only if the split names them.

    Parameters
    ----------
    where
        The split or file, as it begins the sentence.
    no_energy, no_forces, no_virial
        (n,), one for each sample of ``dataset``.

    Raises
    ------
    DataError
        A key that the split names is in none of the samples.
    """
    options = dataset.options
    _report(where, dataset, "energy", ("energy_key", options.energy_key), no_energy)
    key = ("forces_key", options.forces_key)
    if options.gradient_key is not None:
        key = ("gradient_key", options.gradient_key)
    _report(where, dataset, "forces", key, no_forces)
    for option, chosen in (
        ("virial_key", options.virial_key),
        ("stress_key", options.stress_key),
    ):
        if chosen is not None and chosen != NO_KEY:
            _report(where, dataset, "virial", (option, chosen), no_virial)


def warn_of_missing_labels(
    where: str, dataset: "Dataset", *, only_named: bool = False
) -> None:
    """`report_missing_labels` for a dataset whose samples are read for it.

    With ``only_named`` samples count that have other names like labels: structures
    without any are as they should be where labels are made.
    """
    missing = np.zeros((3, len(dataset)), np.bool_)
    for index in range(len(dataset)):
        if only_named and not dataset.label_names(index):
            continue
        sample = dataset[index]
        missing[:, index] = (
            np.isnan(sample.energy),
            np.isnan(sample.forces).all(),
            np.isnan(sample.virial).any(),
        )
    report_missing_labels(where, dataset, *missing)


def _report(
    where: str,
    dataset: "Dataset",
    label: str,
    key: tuple[str, str | None],
    missing: npt.NDArray[np.bool_],
) -> None:
    if not missing.any():
        return
    first = int(np.argmax(missing))
    name = dataset.sample_ids[first]
    found = dataset.label_names(first)
    others = ", ".join(map(repr, found[:_NAMED])) or "no other name like a label"
    option, chosen = key
    if missing.all() and chosen is not None:
        raise DataError(
            f"{where}: no sample has {chosen!r}, which {option} names; the first is "
            f"{name!r} and has {others}."
        )
    advice = f"; set {where}.{option}" if found and where.startswith("splits.") else ""
    log.warning(
        "%s: %d of %d samples have no %s; the first is %r and has %s%s",
        where,
        int(missing.sum()),
        len(missing),
        label,
        name,
        others,
        advice,
    )


def _labels(
    record: Record, options: ReadOptions
) -> tuple[tuple[str, Any] | None, tuple[str, Any] | None]:
    """Name and value of the energy and of the forces or the gradient."""
    energies, forces = record.energy_names, record.forces_names
    if options.energy_key is not None:
        energies = (options.energy_key,)
    if (key := options.gradient_key or options.forces_key) is not None:
        forces = (key,)
    return _first(record.properties, energies), _first(record.properties, forces)


def _find_strain_labels(
    record: Record, options: ReadOptions
) -> tuple[tuple[str, Any] | None, tuple[str, Any] | None]:
    """Name and value of the virial and of the stress.

    Under names that no split gives, only six or nine numbers are one: files also have
    virials of single atoms there, or the trace.
    """
    properties = record.properties
    named = options.virial_key, options.stress_key
    if named != (None, None):
        virial, stress = (
            None if key in (None, NO_KEY) else _first(properties, (str(key),))
            for key in named
        )
        return virial, stress
    virial, stress = (_first(properties, names) for names in (_VIRIALS, _STRESSES))
    return (
        virial if virial is not None and has_components(virial[1]) else None,
        stress if stress is not None and has_components(stress[1]) else None,
    )


def _strain_labels(
    record: Record, options: ReadOptions, factors: Factors
) -> tuple[StrainLabel | None, StrainLabel | None]:
    """The virial and the stress of a record, with their factors to eV and eV/Å³."""
    virial, stress = _find_strain_labels(record, options)
    return (
        None if virial is None else StrainLabel(*virial, factors.energy),
        None if stress is None else StrainLabel(*stress, factors.stress),
    )


def _searches(
    record: Record, options: ReadOptions
) -> list[tuple[tuple[str, ...], str]]:
    """Names that are looked for without the split's word, and the key to give it."""
    found = []
    if options.energy_key is None:
        found.append((record.energy_names, "energy_key"))
    if options.forces_key is None and options.gradient_key is None:
        found.append((record.forces_names, "forces_key"))
    if options.virial_key is None and options.stress_key is None:
        found += [(_VIRIALS, "virial_key"), (_STRESSES, "stress_key")]
    return found


def _refuse_two(
    properties: Mapping[str, Any], names: Sequence[str], key: str, where: str
) -> None:
    """Raise DataError where a label has two names, also by case, and two values."""
    wanted = {name.lower() for name in names}
    alike = [name for name in properties if name.lower() in wanted]
    if len(alike) < 2:
        return
    values = {n: v for n in alike if (v := properties[n]) is not None}
    first = next(iter(values.values()), None)
    if not all(_agree(first, value) for value in values.values()):
        raise DataError(
            f"{where} has {' and '.join(map(repr, values))} with different values; "
            f"name the one that is meant with {key}."
        )


def _agree(first: Any, second: Any) -> bool:
    try:
        return bool(
            np.allclose(first, second, rtol=_SINGLE, atol=_SINGLE, equal_nan=True)
        )
    except (TypeError, ValueError):
        return False


def _first(
    properties: Mapping[str, Any], names: Sequence[str]
) -> tuple[str, Any] | None:
    for name in names:
        found = find(properties, name)
        if found is not None and found[1] is not None:
            return found
    return None
