"""What a store will hold: one pass over each dataset, then arrays and blocks."""

import hashlib
import json
import logging
from collections.abc import Container, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.build.scan import Scan
from pipeline.datasets import Dataset
from pipeline.errors import SpecError
from pipeline.fields import (
    COMPANION_FIELDS,
    EDGE_IDENTITY_FIELDS,
    FIELDS,
    LABEL_FIELDS,
    PREDICTION_FIELDS,
    STRUCTURE_FIELDS,
    TEACHER_VIRIAL,
)
from pipeline.models.elements import list_symbols
from pipeline.spec.cache_spec import CacheSpec, read_reference_energies
from pipeline.spec.sections import (
    DEFAULT_STEP,
    NO_REFERENCES,
    PER_ELEMENT,
    FeatureSpec,
    SplitSpec,
)
from pipeline.store.calibration import Calibration
from pipeline.store.layout import INNER_ROWS, plan_blocks
from pipeline.store.quantization import DTYPES
from pipeline.store.writer import ArrayPlan, SplitPlan
from pipeline.teachers.runner import TeacherRunner, width_shape

log = logging.getLogger("pipeline.build.plan")


def plan_split(
    spec: CacheSpec,
    name: str,
    dataset: Dataset,
    scan: Scan,
    teacher: TeacherRunner | None,
    calibrations: Mapping[str, Calibration] = MappingProxyType({}),
    planned: Container[str] | None = None,
) -> SplitPlan:
    """Blocks and arrays of split ``name``.

    ``calibrations`` of the fields that are not stored faithfully may be missing where
    the plan is only compared with that of a store that is there. ``planned`` are the
    paths of its arrays: it may lack virials, as stores of earlier versions do.

    Raises
    ------
    SpecError
        A sample has more atoms than a block has rows.
    """
    largest = int(np.argmax(dataset.n_atoms))
    if dataset.n_atoms[largest] > spec.store.rows_per_block:
        raise SpecError(
            f"splits.{name}: sample {dataset.sample_ids[largest]!r} has "
            f"{dataset.n_atoms[largest]} atoms, more than store.rows_per_block = "
            f"{spec.store.rows_per_block}; raise it."
        )
    blocks = plan_blocks(
        dataset.n_atoms,
        # A split that fits into one block gets one of its own size.
        min(spec.store.rows_per_block, _whole_chunks(dataset.n_atoms)),
        spec.store.seed,
        scan.n_edges,
    )
    plan = SplitPlan(
        name=name,
        sample_ids=[dataset.sample_ids[int(i)] for i in blocks.order],
        checksums=scan.structure_hashes[blocks.order],
        blocks=blocks,
        arrays=_array_plans(
            spec,
            spec.splits[name],
            teacher,
            calibrations,
            _virial_fields(scan, teacher, planned),
        ),
    )
    if blocks.edges is not None:
        _log_edge_size(plan, blocks.edges.rows_per_block)
    return plan


def _whole_chunks(n_atoms: npt.NDArray[np.int32]) -> int:
    """All atoms of a split, rounded up to whole inner chunks."""
    return -(-int(n_atoms.sum(dtype=np.int64)) // INNER_ROWS) * INNER_ROWS


def warn_undetermined(
    splits: Mapping[str, SplitSpec], scans: Mapping[str, Scan]
) -> None:
    """Warn of splits whose compositions leave fitted reference energies open.

    Not of one beside a larger split that determines them, such as for validation.
    """
    fitted = {
        name: scans[name]
        for name, split in splits.items()
        if split.reference_energies == PER_ELEMENT
    }
    found: dict[str, tuple[int, ...]] = {}
    for name, scan in fitted.items():
        larger = [
            s for s in fitted.values() if len(s.sample_hashes) > len(scan.sample_hashes)
        ]
        if not any(_determines(other, scan.undetermined) for other in larger):
            found |= {name: scan.undetermined} if scan.undetermined else {}
    if found:
        log.warning(
            "%s: the compositions of the samples do not determine the reference "
            "energies of %s, so energies of other compositions will be "
            "meaningless; add samples of other compositions, such as isolated "
            "atoms, or name a file in splits.NAME.reference_energies",
            ", ".join(f"splits.{name}" for name in found),
            list_symbols([z for elements in found.values() for z in elements]),
        )


def _determines(scan: Scan, elements: Sequence[int]) -> bool:
    """Whether the compositions of a split determine the energies of ``elements``."""
    references = scan.labels.element_references
    return all(references[z] != 0.0 for z in elements) and not any(
        z in scan.undetermined for z in elements
    )


def _log_edge_size(plan: SplitPlan, rows_per_block: int) -> None:
    row = sum(
        np.dtype(a.dtype).itemsize * int(np.prod(a.shape, dtype=np.int64))
        for a in plan.arrays
        if a.level == "edge"
    )
    block = rows_per_block * row / 1e9
    log.warning(
        "splits.%s: edge arrays will take %.3g GB, %.3g GB in each of %d blocks, "
        "and a block must fit into memory; store edge_to_node_features instead, or "
        "lower store.rows_per_block",
        plan.name,
        block * plan.blocks.n_blocks,
        block,
        plan.blocks.n_blocks,
    )


def _array_plans(
    spec: CacheSpec,
    split: SplitSpec,
    teacher: TeacherRunner | None,
    calibrations: Mapping[str, Calibration],
    virials: Sequence[str],
) -> tuple[ArrayPlan, ...]:
    names: list[str] = [*STRUCTURE_FIELDS, *LABEL_FIELDS]
    wanted: dict[str, FeatureSpec] = {}
    widths: dict[str, int] = {}
    if teacher is not None:
        wanted = features_of_split(spec, split)
        names += [*PREDICTION_FIELDS, *wanted]
        if "edge_features" in wanted:
            names += EDGE_IDENTITY_FIELDS
        names += [other for n in wanted for other in COMPANION_FIELDS.get(n, ())]
        widths = teacher.stored_widths
    names += virials
    return tuple(
        ArrayPlan(
            path=FIELDS[name].path,
            level=FIELDS[name].level,
            shape=width_shape(name, widths.get(name, 0)),
            dtype=stored_dtype(name, wanted.get(name)),
            attributes=array_attributes(name, wanted.get(name)),
            calibration=calibrations.get(name),
        )
        for name in names
    )


def _virial_fields(
    scan: Scan, teacher: TeacherRunner | None, planned: Container[str] | None
) -> list[str]:
    """Virials that a split stores: labels if there are some, and the teacher's.

    The teacher's only beside periodic structures: that of a molecule is the sum of
    positions times forces, which the store has.
    """
    found = ["virial"] if scan.contents.virial else []
    if teacher is not None and teacher.potential.has_virial and scan.contents.periodic:
        found.append(TEACHER_VIRIAL)
    return [n for n in found if planned is None or FIELDS[n].path in planned]


def stored_dtype(name: str, feature: FeatureSpec | None) -> str:
    """Dtype in which field ``name`` is stored when stored as ``feature`` says."""
    if feature is None:
        return FIELDS[name].dtype
    return DTYPES.get(feature.profile) or feature.dtype or FIELDS[name].dtype


def array_attributes(name: str, feature: FeatureSpec | None) -> dict[str, Any]:
    """Attributes of the array of field ``name``, stored as ``feature`` says."""
    field = FIELDS[name]
    attributes: dict[str, Any] = {"unit": field.unit, "meaning": field.meaning}
    if feature is not None and feature.profile != "faithful":
        attributes["profile"] = feature.profile
        attributes["stated_error"] = feature.stated_error
    if name == "force_jacobian" and feature is not None:
        attributes["step"] = feature.step or DEFAULT_STEP
    return attributes


def features_of_split(spec: CacheSpec, split: SplitSpec) -> dict[str, FeatureSpec]:
    """Fields that the teacher is asked for in this split, with their options."""
    if isinstance(split.features, bool):
        return dict(spec.features) if split.features else {}
    return {
        name: part for name, part in spec.features.items() if name in split.features
    }


def store_attributes(
    spec: CacheSpec,
    scans: Mapping[str, Scan],
    plans: Mapping[str, SplitPlan],
    teacher: TeacherRunner | None,
) -> dict[str, Any]:
    """Provenance of the store and the fingerprint of all that decides its numbers."""
    identity = {
        "teacher": None if teacher is None else teacher.identity,
        "splits": {
            name: {
                "features": s.features,
                "content": scans[name].content_sha256,
                "reference_energies": _references(s.reference_energies),
                **_virial_identity(scans[name], plans[name]),
            }
            for name, s in spec.splits.items()
        },
        "arrays": {
            name: [array_identity(array) for array in plan.arrays]
            for name, plan in plans.items()
        },
        "rows_per_block": spec.store.rows_per_block,
        "order_seed": spec.store.seed,
    }
    # The statistics follow from what is above, but their last bits differ between
    # machines, so they are no part of the fingerprint.
    text = json.dumps(identity, sort_keys=True)
    return {
        **identity,
        "label_statistics": {n: s.labels.to_dict() for n, s in scans.items()},
        "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
        "provenance": {
            "spec": spec.model_dump(),
            "teacher": None if teacher is None else dict(teacher.potential.provenance),
            "labelled": {n: s.contents.labelled for n, s in scans.items()},
            "contents": {n: s.contents.to_dict() for n, s in scans.items()},
            "software": {n: version(n) for n in ("kd-train", "torch", "zarr", "vesin")},
        },
    }


def _virial_identity(scan: Scan, plan: SplitPlan) -> dict[str, str | None]:
    """The hash of the virials of a split that stores them."""
    stored = any(array.path == FIELDS["virial"].path for array in plan.arrays)
    return {"virials": scan.virials_sha256} if stored else {}


def array_identity(array: ArrayPlan) -> list[Any]:
    """What the fingerprint holds of an array; an encoding's parameters follow from it.

    Their last bits differ between machines, as those of the statistics do.
    """
    profile = [
        array.attributes[key]
        for key in ("profile", "stated_error", "step")
        if key in array.attributes
    ]
    return [array.path, list(array.shape), array.dtype, *profile]


def _references(choice: str) -> str | dict[str, float]:
    """The choice by its name, or what the named file says."""
    if choice in (PER_ELEMENT, NO_REFERENCES):
        return choice
    energies = read_reference_energies(Path(choice))
    return {str(number): energy for number, energy in sorted(energies.items())}
