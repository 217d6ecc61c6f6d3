"""A first look: the teacher on a few samples of a dataset, before any long work."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.datasets import Dataset
from pipeline.datasets.label_statistics import KIND_DIFFERENCE
from pipeline.fields import PREDICTION_FIELDS, TEACHER_VIRIAL
from pipeline.graphs.neighbors import limit_warning
from pipeline.structure import Sample
from pipeline.teachers.runner import Arrays, TeacherRunner

log = logging.getLogger("pipeline.build.preflight")
SAMPLES = 8
# Forces of labels and teacher are alike down to this cosine and within this ratio.
LEAST_COSINE = 0.5
LARGEST_RATIO = 3.0
# Below this (eV/Å, root mean square) forces are those of relaxed structures, of which a
# sound teacher may have any direction.
_RELAXED = 0.1
# A factor between forces has a likely cause where it is so near to the cause's.
_NEAR = 1.15
# Teacher over label, for labels in other units: what they are then multiplied with.
_UNITS = {
    "Hartree/Bohr": 51.422,
    "Hartree/Å": 27.211,
    "Ry/Bohr": 25.711,
    "Ry/Å": 13.606,
    "kcal/mol/Å": 1 / 23.061,
    "kJ/mol/Å": 1 / 96.485,
    "kJ/mol/nm": 1 / 964.85,
    "meV/Å": 1 / 1000,
    "eV/nm": 1 / 10,
}

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ForceMatch:
    """How forces of labels compare with those of the teacher, on some samples.

    ``cosine`` over all components together; ``labels`` and ``teacher`` are root mean
    squares in eV/Å. ``samples`` have forces on free atoms.
    """

    samples: int
    cosine: float
    labels: float
    teacher: float

    @property
    def ratio(self) -> float:
        """Root mean square of the labels over that of the teacher."""
        return self.labels / self.teacher

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "samples": self.samples,
            "cosine": self.cosine,
            "rms_ratio": self.ratio,
            "rms_teacher": self.teacher,
        }


def preview(
    split: str, dataset: Dataset, teacher: TeacherRunner, fields: Sequence[str]
) -> dict[str, Any]:
    """What a few samples tell about ``teacher`` on this dataset; JSON-able.

    ``energy_difference`` is the median distance of its energies to the labels, in eV
    per atom, ``forces`` how its forces compare with theirs (each None without labels);
    ``precision_error`` is that of reduced precision, by field. Warns where one matters.

    Raises
    ------
    DataError
        One of the samples cannot be predicted.
    """
    chosen = np.linspace(0, len(dataset) - 1, min(SAMPLES, len(dataset)), dtype=int)
    samples = [dataset[int(i)] for i in chosen]
    given = teacher.predict(samples, teacher.virial_fields)
    _report_virials(split, samples, given)
    forces = match_forces(samples, given)
    found: dict[str, Any] = {
        "energy_difference": _energy_difference(split, samples, given),
        "forces": None if forces is None else forces.to_dict(),
    }
    if forces is not None:
        _report_forces(split, forces)
    if teacher.spec.precision != "float32":
        errors = teacher.precision_error(samples, fields)
        found["precision_error"] = errors
        text = ", ".join(_format_error(name, error) for name, error in errors.items())
        log.warning(
            "teacher.precision: %s changes results on %d samples of splits.%s: %s",
            teacher.spec.precision,
            len(samples),
            split,
            text,
        )
    _report_limit(split, samples, teacher)
    return found


def match_virials(samples: Sequence[Sample], given: Arrays) -> tuple[int, float] | None:
    """Return how many samples have a virial, and its cosine with the teacher's.

    Over all components together; None if there is nothing to compare, or stresses
    nearly vanish, as in relaxed structures.
    """
    if TEACHER_VIRIAL not in given:
        return None
    labels = np.stack([sample.virial for sample in samples])
    known = np.isfinite(labels).all(axis=(1, 2))
    sizes = np.array([len(sample.structure) for sample in samples])[known]
    pair = [
        side[known] / sizes[:, None, None] for side in (labels, given[TEACHER_VIRIAL])
    ]
    if not known.any() or min(float(np.abs(side).max()) for side in pair) < _RELAXED:
        return None
    first, second = (side.reshape(-1) for side in pair)
    norms = np.linalg.norm(first) * np.linalg.norm(second)
    return int(known.sum()), float(first @ second) / float(norms)


def _report_virials(split: str, samples: Sequence[Sample], given: Arrays) -> None:
    found = match_virials(samples, given)
    if found is not None and found[1] <= -LEAST_COSINE:
        log.warning(
            "splits.%s: the virials of labels and teacher have cosine %.2f on %d "
            "samples; the labels may have the opposite sign, since stress must be "
            "positive in tension and virial is minus volume times stress",
            *(split, found[1], found[0]),
        )


def match_forces(samples: Sequence[Sample], given: Arrays) -> ForceMatch | None:
    """Compare the forces of labelled ``samples`` with the teacher's; free atoms only.

    None where there is nothing to compare.
    """
    ends = np.cumsum([len(sample.structure) for sample in samples])[:-1]
    predicted = np.split(given["teacher_forces"].astype(np.float64), ends)
    pairs: list[tuple[_Floats, _Floats]] = []
    for sample, forces in zip(samples, predicted, strict=True):
        there = ~sample.structure.fixed & np.isfinite(sample.forces).all(axis=1)
        if there.any():
            pairs.append((sample.forces[there].astype(np.float64), forces[there]))
    if not pairs:
        return None
    labels, teacher = (np.concatenate(side) for side in zip(*pairs, strict=True))
    sizes = [float(np.sqrt(np.square(side).mean())) for side in (labels, teacher)]
    if not all(0 < size < np.inf for size in sizes):
        return None
    cosine = float((labels * teacher).mean()) / (sizes[0] * sizes[1])
    return ForceMatch(len(pairs), cosine, *sizes)


def likely_cause(split: str, found: ForceMatch) -> str | None:
    """What is likely wrong with the labels and which key sets it right, or None."""
    if max(found.labels, found.teacher) < _RELAXED:
        return None
    unit = _likely_unit(split, found)
    if found.cosine <= -LEAST_COSINE:
        text = (
            "the labels have the opposite direction, so they may be gradients; "
            f"name them with splits.{split}.gradient_key"
        )
        return text if unit is None else f"{text}, and {unit}"
    if found.cosine < LEAST_COSINE:
        if found.labels < _RELAXED:
            return None
        return (
            "they differ, so the labels may belong to other atoms or be in another "
            "order, or the teacher may not fit these systems; check "
            f"splits.{split}.forces_key and the teacher"
        )
    if 1 / LARGEST_RATIO <= found.ratio <= LARGEST_RATIO:
        return None
    return unit or f"the labels may have another unit; set splits.{split}.units"


def _likely_unit(split: str, found: ForceMatch) -> str | None:
    """Units in which labels would be so large or so small, and the key to set."""
    if 1 / LARGEST_RATIO <= found.ratio <= LARGEST_RATIO:
        return None
    off = {unit: abs(np.log(factor * found.ratio)) for unit, factor in _UNITS.items()}
    nearest = sorted(off, key=off.__getitem__)
    if off[nearest[0]] > np.log(LARGEST_RATIO):
        return None
    alike = [u for u in nearest if off[u] <= off[nearest[0]] + np.log(_NEAR)]
    named = " or ".join(f"{unit} ({_factor(unit)})" for unit in alike)
    key = f"splits.{split}.units: {{forces: {alike[0]}}}"
    return f"the labels may be in {named}; set {key}"


def _factor(unit: str) -> str:
    factor = _UNITS[unit]
    return f"× {factor:.4g}" if factor > 1 else f"/ {1 / factor:.4g}"


def _report_forces(split: str, found: ForceMatch) -> None:
    cause = likely_cause(split, found)
    text = (
        f"splits.{split}: the forces of labels and teacher have cosine "
        f"{found.cosine:.2f} and RMS ratio {found.ratio:.3g} on {found.samples} "
        "samples"
    )
    if cause is None:
        log.info("%s", text)
    else:
        log.warning("%s; %s", text, cause)


def _energy_difference(
    split: str, samples: Sequence[Sample], given: Arrays
) -> float | None:
    per_atom = [
        abs(float(energy) - sample.energy) / len(sample.structure)
        for energy, sample in zip(given["teacher_energy"], samples, strict=True)
        if np.isfinite(sample.energy)
    ]
    if not per_atom:
        return None
    difference = float(np.median(per_atom))
    if difference > KIND_DIFFERENCE:
        log.warning(
            "splits.%s: the teacher's energies differ from the labels by %.3g eV "
            "per atom, so they may be of different kinds (total, adsorption, ...); "
            "students will use the labels' kind of energy, and vanilla losses make "
            "no sense",
            split,
            difference,
        )
    return difference


def _report_limit(
    split: str, samples: Sequence[Sample], teacher: TeacherRunner
) -> None:
    """Warn of atoms that have more neighbours than the teacher sees."""
    potential = teacher.potential
    crowded = sum(potential.graph(sample).edges.crowded for sample in samples)
    atoms = sum(len(sample.structure) for sample in samples)
    text = limit_warning(potential.graph_rule, crowded, atoms)
    if text is not None:
        log.warning("splits.%s: %s", split, text)


def _format_error(name: str, error: float) -> str:
    units = {"teacher_energy": "eV", "teacher_forces": "eV/Å"}
    if name in PREDICTION_FIELDS:
        return f"{name} by {error:.2g} {units[name]}"
    return f"{name} by {100 * error:.2g} %"
