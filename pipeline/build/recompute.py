"""Asks the teacher again, to see whether it gives what a store says it gave."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import SpecError
from pipeline.fields import (
    CACHEABLE_FIELDS,
    DERIVED_FIELDS,
    FIELDS,
    LABEL_FIELDS,
    PREDICTION_FIELDS,
    STRUCTURE_FIELDS,
    TEACHER_VIRIAL,
)
from pipeline.spec.cache_spec import CacheSpec
from pipeline.spec.renamed_keys import rename_keys
from pipeline.spec.sections import FeatureSpec, TeacherSpec
from pipeline.spec.yaml_model import apply_overrides, as_json, validate
from pipeline.store.reader import FeatureStore, SplitReader
from pipeline.structure import Sample, Structure
from pipeline.teachers.jacobian import ColumnSpec
from pipeline.teachers.runner import TeacherRunner

log = logging.getLogger("pipeline.build.recompute")

# Squared differences relative to the size of what is stored: half precision rounds by
# 1e-7, other devices and batches by less; another network is off by about 1.
TOLERANCE = 1e-5
# A single sample may be worse off than the average that a store states.
_WORSE = 20
# What decides how a pass is cut but not what it gives.
_NO_IDENTITY = {"batch_atoms", "batch_gib", "layers"}


@dataclass(frozen=True)
class Difference:
    """Relative squared difference of a field of a sample to what the teacher gives."""

    split: str
    sample_id: str
    field: str
    value: float
    allowed: float

    def __str__(self) -> str:
        return (
            f"Sample {self.sample_id!r} of split {self.split!r}: {self.field} "
            "differs from the teacher's result (relative squared difference "
            f"{self.value:.2g}, allowed {self.allowed:.2g})."
        )


def spot_check(
    path: Path | str,
    samples: int,
    *,
    seed: int = 0,
    device: str = "cpu",
    overrides: Iterable[str] = (),
) -> tuple[list[Difference], int]:
    """Compare ``samples`` random samples of every split with the teacher.

    Returns the differences that are too large and how many numbers were compared.
    Nothing but the store and the teacher's files is read; ``overrides`` of the
    ``teacher`` section say where these are now.

    Raises
    ------
    SpecError
        The store has no teacher, or it was another one.
    """
    store = FeatureStore.open(path)
    teacher = _load_teacher(store, device, overrides)
    rng = np.random.default_rng(seed)
    found, compared = [], 0
    for split in store.splits.values():
        count = min(samples, len(split))
        for position in np.sort(rng.choice(len(split), count, replace=False)):
            for difference in _differences(split, int(position), teacher):
                compared += 1
                log.info("%s", difference)
                if not difference.value <= difference.allowed:
                    found.append(difference)
    return found, compared


def _load_teacher(
    store: FeatureStore, device: str, overrides: Iterable[str]
) -> TeacherRunner:
    known = store.attributes["teacher"]
    if known is None:
        raise SpecError(
            f"{store.path} was made without a teacher; leave --teacher out."
        )
    saved = {"teacher": store.attributes["provenance"]["spec"]["teacher"]}
    document = rename_keys(CacheSpec, saved, str(store.path), warn=False)
    apply_overrides(document, overrides, CacheSpec)
    spec = validate(TeacherSpec, document["teacher"], f"{store.path}: teacher")
    if spec.checkpoint is not None and not Path(spec.checkpoint).exists():
        raise SpecError(
            f"teacher.checkpoint: {spec.checkpoint} does not exist; set its path "
            "with --set teacher.checkpoint=PATH."
        )
    saved_features = store.attributes["provenance"]["spec"]["features"]
    columns = _saved_columns(saved_features)
    teacher = TeacherRunner.load(spec, device, known["layers"], columns)
    identity = as_json(teacher.identity)
    for key in sorted(known.keys() - _NO_IDENTITY):
        if identity.get(key) != known[key]:
            raise SpecError(
                f"The teacher's {key} is {identity.get(key)!r} and {known[key]!r} "
                f"in {store.path}; use the teacher that built the store."
            )
    return teacher


def _saved_columns(features: Mapping[str, Any]) -> ColumnSpec:
    """Return the columns that the ``features`` of a saved spec ask for."""
    saved = features.get("force_jacobian") or {}
    wanted = FeatureSpec(columns=saved.get("columns"), step=saved.get("step"))
    return ColumnSpec.of({"force_jacobian": wanted})


def _differences(
    split: SplitReader, position: int, teacher: TeacherRunner
) -> list[Difference]:
    known = (TEACHER_VIRIAL, *CACHEABLE_FIELDS, *DERIVED_FIELDS)
    fields = [name for name in known if FIELDS[name].path in split.arrays]
    names = [*PREDICTION_FIELDS, *fields]
    paths = {name: FIELDS[name].path for name in names}
    stored = split.read([position], list(paths.values()))
    given = teacher.predict([_sample(split, position)], fields)
    found = []
    for name, path in paths.items():
        error = split.error(path)
        found.append(
            Difference(
                split.name,
                str(split.sample_ids[position]),
                name,
                _relative(stored[path], given[name]),
                TOLERANCE if error is None else TOLERANCE + _WORSE * error,
            )
        )
    return found


def _relative(stored: npt.NDArray[Any], given: npt.NDArray[Any]) -> float:
    if stored.shape != given.shape:
        return float("inf")
    wrong = np.square(stored.astype(np.float64) - given).sum()
    size = np.square(given.astype(np.float64)).sum()
    return float(wrong / size) if size else float(wrong)


def _sample(split: SplitReader, position: int) -> Sample:
    """A sample as the dataset gave it when the store was built."""
    names = (*STRUCTURE_FIELDS, *LABEL_FIELDS)
    rows = split.read([position], [FIELDS[name].path for name in names])
    values = {name: rows[FIELDS[name].path] for name in names}
    structure = Structure(
        values["atomic_numbers"],
        values["positions"],
        values["cell"][0],
        values["pbc"][0].astype(np.bool_),
        values["tags"],
        values["fixed"].astype(np.bool_),
    )
    name = str(split.sample_ids[position])
    return Sample(name, structure, float(values["energy"][0]), values["forces"])
