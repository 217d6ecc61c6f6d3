"""``CacheSpec``: what a store is made of, read from ``cache_specs/*.yaml``."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field as Key
from pydantic import field_validator

from pipeline.documents import (
    ClosedModel,
    apply_overrides,
    expand_path,
    nearest,
    read_yaml,
    validate,
)
from pipeline.errors import SpecError
from pipeline.fields import CACHEABLE_FIELDS


class TeacherSpec(ClosedModel):
    """Which network is run, and how."""

    model: str = Key(description="painn | schnet")
    checkpoint: str = Key(description="OCP/fairchem-1.x .pt or our .safetensors")
    scale_file: str | None = Key(
        None, description="only for checkpoints without scale factors"
    )
    precision: Literal["float32"] = Key("float32", description="of the forward pass")
    weights: Literal["ema", "raw"] = Key(
        "ema", description="moving average where the file has one, or the last step's"
    )
    batch_atoms: int = Key(2048, ge=1, description="atoms in one forward pass")


class SplitSpec(ClosedModel):
    """One dataset, stored as one group."""

    format: Literal["extxyz"] = Key(description="extxyz, also .gz and .xz")
    path: str = Key(description="file, relative to the spec or absolute")
    features: bool = Key(
        True, description="false: structures, labels, teacher energy and forces only"
    )
    offset: int = Key(0, ge=0, description="samples passed over at the start")
    limit: int | None = Key(None, ge=1, description="at most so many samples")
    every: int = Key(1, ge=1, description="1 = all, n = each n-th sample")
    reference_energies: Literal["per_element", "none"] = Key(
        "per_element", description="least squares per element, kept beside the labels"
    )


class FeatureSpec(ClosedModel):
    """How one field is stored."""

    profile: Literal["faithful"] = Key("faithful", description="lossless in its dtype")
    dtype: Literal["float16", "float32"] | None = Key(
        None, description="default: the field's own"
    )


class StoreSpec(ClosedModel):
    """Where the store lies and how it is cut."""

    path: str
    rows_per_block: int = Key(131072, ge=1024, multiple_of=1024)
    seed: int = Key(0, ge=0, description="of the permutation of samples")


class CacheSpec(ClosedModel):
    """A whole spec; without ``teacher`` it makes a store of labels only."""

    teacher: TeacherSpec | None = None
    splits: dict[str, SplitSpec] = Key(min_length=1)
    features: dict[str, FeatureSpec] = Key(default_factory=dict)
    store: StoreSpec

    @field_validator("features", mode="before")
    @classmethod
    def _empty_means_defaults(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {name: {} if part is None else part for name, part in value.items()}


def load_spec(path: Path, overrides: Iterable[str] = ()) -> CacheSpec:
    """The spec at ``path`` with overrides applied and every path made absolute.

    Raises
    ------
    SpecError
        A key is unknown, missing or of the wrong kind, a field is unknown, an
        environment variable is unset, or a named file does not exist.
    """
    document = read_yaml(path)
    apply_overrides(document, overrides)
    return resolve(validate(CacheSpec, document, str(path)), path.resolve().parent)


def resolve(spec: CacheSpec, folder: Path) -> CacheSpec:
    """``spec`` with absolute, existing paths and consistent choices."""
    _check_choices(spec)
    splits = {
        name: split.model_copy(
            update={"path": _existing(split.path, folder, f"splits.{name}.path")}
        )
        for name, split in spec.splits.items()
    }
    teacher = spec.teacher
    if teacher is not None:
        changes = {
            "checkpoint": _existing(teacher.checkpoint, folder, "teacher.checkpoint")
        }
        if teacher.scale_file is not None:
            changes["scale_file"] = _existing(
                teacher.scale_file, folder, "teacher.scale_file"
            )
        teacher = teacher.model_copy(update=changes)
    place = str(expand_path(spec.store.path, folder, "store.path"))
    store = spec.store.model_copy(update={"path": place})
    return spec.model_copy(
        update={"splits": splits, "teacher": teacher, "store": store}
    )


def _check_choices(spec: CacheSpec) -> None:
    for name in spec.features:
        if name not in CACHEABLE_FIELDS:
            hint = nearest(name, CACHEABLE_FIELDS)
            raise SpecError(f"features: unknown field {name!r}{hint}.")
    if spec.features and spec.teacher is None:
        raise SpecError(
            "The spec asks for features but names no teacher; add a teacher: section "
            "or remove features:."
        )
    for name in spec.splits:
        if not name.isidentifier():
            raise SpecError(f"splits: {name!r} must be letters, digits and '_' only.")


def _existing(text: str, folder: Path, key: str) -> str:
    path = expand_path(text, folder, key)
    if not path.exists():
        raise SpecError(f"{key}: {path} does not exist; set it with --set {key}=PATH.")
    return str(path)
