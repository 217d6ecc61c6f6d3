"""What the samples of a split have: counts, gaps among labels, and a table of them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from ase.data import chemical_symbols

from pipeline.datasets import Dataset
from pipeline.datasets.labels import NO_KEY, is_like, is_per_atom
from pipeline.errors import DataError
from pipeline.spec.sections import SplitSpec
from pipeline.structure import Sample

log = logging.getLogger("pipeline.build.contents")

# Keys of a split that name where a label is, in the order in which they are advised.
LABEL_KEYS = {
    "energy": ("energy_key",),
    "forces": ("forces_key", "gradient_key"),
    "virial": ("virial_key", "stress_key"),
}
_ONE = {"energy": "an energy", "forces": "forces", "virial": "a virial"}
_NAMED = 3


@dataclass(frozen=True)
class Gap:
    """The first sample that lacks a label: its place, its id, similar names it has."""

    index: int
    sample_id: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contents:
    """Counts of a split's samples, in the order of its dataset.

    ``energy``, ``forces`` and ``virial`` are samples with that label, ``periodic``
    those that are periodic along any axis, ``elements`` atomic numbers. ``gaps`` holds
    the first sample without each label that is not everywhere.
    """

    frames: int = 0
    energy: int = 0
    forces: int = 0
    periodic: int = 0
    elements: frozenset[int] = frozenset()
    gaps: Mapping[str, Gap] = field(default_factory=dict)
    virial: int = 0

    @classmethod
    def of(cls, samples: Sequence[Sample], first: int = 0) -> "Contents":
        """Counts of ``samples``, which begin at place ``first`` of their dataset."""
        has = {
            "energy": [bool(np.isfinite(s.energy)) for s in samples],
            "forces": [bool(np.isfinite(s.forces).all()) for s in samples],
            "virial": [bool(np.isfinite(s.virial).all()) for s in samples],
        }
        numbers = [s.structure.atomic_numbers for s in samples]
        return cls(
            len(samples),
            sum(has["energy"]),
            sum(has["forces"]),
            sum(bool(s.structure.pbc.any()) for s in samples),
            frozenset(np.unique(np.concatenate(numbers)).tolist() if numbers else ()),
            {
                label: Gap(first + found.index(False))
                for label, found in has.items()
                if not all(found)
            },
            sum(has["virial"]),
        )

    def __add__(self, other: "Contents") -> "Contents":
        """Counts of both, where ``other`` comes after."""
        return Contents(
            self.frames + other.frames,
            self.energy + other.energy,
            self.forces + other.forces,
            self.periodic + other.periodic,
            self.elements | other.elements,
            {**other.gaps, **self.gaps},
            self.virial + other.virial,
        )

    def named(self, dataset: Dataset) -> "Contents":
        """The same with ids of the first samples in the gaps, and names they have."""
        gaps = {
            label: replace(
                gap,
                sample_id=dataset.sample_ids[gap.index],
                names=tuple(dataset.label_names(gap.index)),
            )
            for label, gap in self.gaps.items()
        }
        return replace(self, gaps=gaps)

    @property
    def labelled(self) -> dict[str, int]:
        """Samples with an energy, with the forces of all their atoms, with a virial.

        Without any virial it has no entry, as in stores of earlier versions.
        """
        known = {"energy": self.energy, "forces": self.forces}
        return known | ({"virial": self.virial} if self.virial else {})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "frames": self.frames,
            **self.labelled,
            "periodic": self.periodic,
            "elements": [chemical_symbols[number] for number in sorted(self.elements)],
            "gaps": {
                label: {
                    "index": gap.index,
                    "sample_id": gap.sample_id,
                    "names": list(gap.names),
                }
                for label, gap in sorted(self.gaps.items())
                if label in self.labelled
            },
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Contents":
        """Invert `to_dict`."""
        gaps = {
            label: Gap(gap["index"], gap["sample_id"], tuple(gap["names"]))
            for label, gap in document["gaps"].items()
        }
        elements = frozenset(map(chemical_symbols.index, document["elements"]))
        names = ("frames", "energy", "forces", "periodic")
        counts = {name: int(document[name]) for name in names}
        counts["virial"] = int(document.get("virial", 0))
        return cls(**counts, elements=elements, gaps=gaps)


def check_labels(split: str, keys: SplitSpec, contents: Contents) -> None:
    """Warn of each label that some samples of a split lack; names what they have.

    Virials are missed only if a key of the split names them.

    Raises
    ------
    DataError
        No sample has a label whose name the split gives with one of its ``keys``.
    """
    for label, gap in contents.gaps.items():
        named = [getattr(keys, key) for key in LABEL_KEYS[label]]
        if label == "virial" and all(name in (None, NO_KEY) for name in named):
            continue
        count = contents.labelled.get(label, 0)
        advice = _advice(split, label, gap, whole=count == 0)
        for key in LABEL_KEYS[label]:
            name = getattr(keys, key)
            if name is not None and count == 0:
                raise DataError(
                    f"splits.{split}: no sample has the {label} under {name!r}, which "
                    f"splits.{split}.{key} names; of the first, {gap.sample_id!r}: "
                    f"{advice}."
                )
        missing = contents.frames - count
        counted = f"{missing} of {contents.frames} samples have no {label}"
        if not count:
            counted = f"none of the {missing} samples has {_ONE[label]}"
        log.warning(
            "splits.%s: %s, the first is %r; %s", split, counted, gap.sample_id, advice
        )


def _advice(split: str, label: str, gap: Gap, whole: bool) -> str:
    keys = " or ".join(f"splits.{split}.{key}" for key in LABEL_KEYS[label])
    alike = [n for n in gap.names if is_like(n, label)]
    if alike and all(map(is_per_atom, alike)):
        return f"it has {_quoted(alike)}, but energies are those of all atoms together"
    if alike:
        return f"it has {_quoted(alike)}, so set {keys} to the right name"
    nothing = (
        f"nothing else in it has a name like {label}, so set {keys} if the label has "
        "another one"
    )
    return f"{nothing}, or splits.{split}.labels: none" if whole else nothing


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def warn_repeated(
    split: str, checksums: npt.NDArray[np.uint64], ids: Sequence[str]
) -> None:
    """Warn of structures that are more than once in a split, of (n,) samples."""
    _, first = np.unique(checksums, return_index=True)
    if len(first) == len(checksums):
        return
    again = np.setdiff1d(np.arange(len(checksums)), first)
    named = ", ".join(repr(ids[int(i)]) for i in again[:_NAMED])
    log.warning(
        "splits.%s: %d of %d samples have structures that an earlier one has as well "
        "(%s%s); if a file is there twice, name or keep one of the two",
        *(split, len(again), len(checksums), named, ", …" * (len(again) > _NAMED)),
    )


def warn_shared(
    checksums: Mapping[str, npt.NDArray[np.uint64]], ids: Mapping[str, Sequence[str]]
) -> None:
    """Warn of structures that two splits have in common.

    ``checksums`` (n,) and ``ids`` are of the samples of each split, in one order.
    """
    names = list(checksums)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            shared = np.flatnonzero(np.isin(checksums[second], checksums[first]))
            if not len(shared):
                continue
            named = ", ".join(repr(ids[second][int(i)]) for i in shared[:_NAMED])
            more = ", …" if len(shared) > _NAMED else ""
            log.warning(
                "splits.%s: %d of %d samples have structures that splits.%s also "
                "has (%s%s); if a student trains on one of the two splits, its "
                "results on the other split are too good",
                *(second, len(shared), len(checksums[second]), first, named, more),
            )
