"""A first look: the teacher on a few samples of a dataset, before any long work."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.datasets import Dataset
from pipeline.fields import PREDICTION_FIELDS
from pipeline.graphs.neighbors import limit_warning
from pipeline.statistics import KIND_DIFFERENCE
from pipeline.structure import Sample
from pipeline.teacher import Teacher

log = logging.getLogger("pipeline.preview")
SAMPLES = 8


def preview(
    split: str, dataset: Dataset, teacher: Teacher, fields: Sequence[str]
) -> dict[str, Any]:
    """What a few samples tell about ``teacher`` on this dataset; JSON-able.

    ``energy_difference`` is the median distance of its energies to the labels, in eV
    per atom (None without labels); ``precision_error`` is that of reduced precision,
    by field. Warns where either matters.

    Raises
    ------
    DataError
        One of the samples cannot be predicted.
    """
    chosen = np.linspace(0, len(dataset) - 1, min(SAMPLES, len(dataset)), dtype=int)
    samples = [dataset[int(i)] for i in chosen]
    found: dict[str, Any] = {
        "energy_difference": _energy_difference(split, samples, teacher)
    }
    if teacher.spec.precision != "float32":
        errors = teacher.precision_error(samples, fields)
        found["precision_error"] = errors
        told = ", ".join(_told(name, error) for name, error in errors.items())
        log.warning(
            "teacher.precision: %s changes, over %d samples of splits.%s: %s",
            teacher.spec.precision,
            len(samples),
            split,
            told,
        )
    _tell_limit(split, samples, teacher)
    return found


def _energy_difference(
    split: str, samples: Sequence[Sample], teacher: Teacher
) -> float | None:
    energies = teacher.predict(samples, ())["teacher_energy"]
    per_atom = [
        abs(float(energy) - sample.energy) / len(sample.structure)
        for energy, sample in zip(energies, samples, strict=True)
        if np.isfinite(sample.energy)
    ]
    if not per_atom:
        return None
    difference = float(np.median(per_atom))
    if difference > KIND_DIFFERENCE:
        log.warning(
            "splits.%s: the teacher's energies are %.3g eV per atom away from the "
            "labels, so they may be of different kinds (total, adsorption, ...); "
            "students will use units of the labels, and vanilla losses make no sense",
            split,
            difference,
        )
    return difference


def _tell_limit(split: str, samples: Sequence[Sample], teacher: Teacher) -> None:
    """Warn of atoms that have more neighbours than the teacher sees."""
    potential = teacher.potential
    crowded = sum(potential.graph(sample).edges.crowded for sample in samples)
    atoms = sum(len(sample.structure) for sample in samples)
    told = limit_warning(potential.graph_rule, crowded, atoms)
    if told is not None:
        log.warning("splits.%s: %s", split, told)


def _told(name: str, error: float) -> str:
    units = {"teacher_energy": "eV", "teacher_forces": "eV/Å"}
    if name in PREDICTION_FIELDS:
        return f"{name} by {error:.2g} {units[name]}"
    return f"{name} by {100 * error:.2g} %"
