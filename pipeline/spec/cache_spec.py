"""``CacheSpec``: what a store is made of, read from ``cache_specs/*.yaml``."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field as Key
from pydantic import field_validator

from pipeline.errors import SpecError
from pipeline.fields import CACHEABLE_FIELDS, CHANNEL_FIELDS, DERIVED_FIELDS
from pipeline.files.globs import glob_matches, is_glob
from pipeline.files.remote import is_url, refuse_credentials
from pipeline.spec.id_list import read_ids
from pipeline.spec.reference_energies import read_reference_energies
from pipeline.spec.renamed_keys import rename_keys
from pipeline.spec.sections import (
    NO_REFERENCES,
    PER_ELEMENT,
    FeatureSpec,
    SplitSpec,
    StoreSpec,
    TeacherSpec,
)
from pipeline.spec.yaml_model import (
    ClosedModel,
    apply_overrides,
    expand_path,
    expand_text,
    nearest,
    read_yaml,
    validate,
)


class CacheSpec(ClosedModel):
    """A whole spec; without ``teacher`` it makes a store of labels only."""

    teacher: TeacherSpec | None = None
    splits: dict[str, SplitSpec] = Key(min_length=1)
    features: dict[str, FeatureSpec] = Key(default_factory=dict)
    store: StoreSpec

    @field_validator("splits", mode="before")
    @classmethod
    def _null_removes(cls, value: object) -> object:
        """Leave out splits set to null, so that ``--set splits.val=null`` drops one."""
        if not isinstance(value, dict):
            return value
        return {name: part for name, part in value.items() if part is not None}

    @field_validator("features", mode="before")
    @classmethod
    def _empty_means_defaults(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {name: {} if part is None else part for name, part in value.items()}


def load_spec(
    path: Path | str, overrides: Iterable[str] = (), out: Path | None = None
) -> CacheSpec:
    """The spec at ``path`` with overrides applied and every path made absolute.

    ``out`` replaces ``store.path`` and is taken as it is: nothing in it is expanded.

    Raises
    ------
    SpecError
        A key is unknown, missing or of the wrong kind, a field is unknown, an
        environment variable is unset, or a named file does not exist.
    """
    path = Path(path)
    document = rename_keys(CacheSpec, read_yaml(path), str(path))
    apply_overrides(document, overrides, CacheSpec)
    if out is not None and isinstance(document.setdefault("store", {}), dict | None):
        document["store"] = {**(document["store"] or {}), "path": str(out)}
    spec = validate(CacheSpec, document, str(path))
    return resolve(spec, path.resolve().parent, out)


def resolve(spec: CacheSpec, folder: Path, out: Path | None = None) -> CacheSpec:
    """``spec`` with absolute, existing paths and consistent choices; ``out`` as above.

    Raises
    ------
    SpecError
        Choices contradict each other, or files are missing; names all of these.
    """
    _check_choices(spec)
    _refuse_missing(spec, folder)
    splits = {
        name: _resolve_split(split, folder, f"splits.{name}")
        for name, split in spec.splits.items()
    }
    changes: dict[str, Any] = {"splits": splits}
    if spec.teacher is not None:
        files = {
            key: str(expand_path(value, folder, f"teacher.{key}"))
            for key in ("checkpoint", "scale_file")
            if (value := getattr(spec.teacher, key)) is not None
        }
        changes["teacher"] = spec.teacher.model_copy(update=files)
    place = out.resolve() if out is not None else _store_path(spec, folder)
    changes["store"] = spec.store.model_copy(update={"path": str(place)})
    return spec.model_copy(update=changes)


def _store_path(spec: CacheSpec, folder: Path) -> Path:
    return expand_path(spec.store.path, folder, "store.path")


def _refuse_missing(spec: CacheSpec, folder: Path) -> None:
    """Raise one error that names every file which is not there, and its source."""
    named: list[tuple[str, str, str | None]] = []
    if spec.teacher is not None:
        teacher = spec.teacher
        if teacher.checkpoint is not None:
            named.append(("teacher.checkpoint", teacher.checkpoint, teacher.source))
        if teacher.scale_file is not None:
            named.append(("teacher.scale_file", teacher.scale_file, None))
    for name, split in spec.splits.items():
        named += [(f"splits.{name}.path", path, split.source) for path in split.paths]
    problems = []
    for key, text, source in named:
        try:
            path = _resolve_path(text, folder, key)
        except SpecError as error:
            problem = str(error).rstrip(".")
        else:
            if Path(path).exists() or (key.startswith("splits.") and _is_there(path)):
                continue
            reason = "matches no file" if is_glob(path) else "does not exist"
            problem = f"{key}: {path} {reason}; set it with --set {key}=PATH"
        problems.append(problem + (f" (published at {source})" if source else ""))
    if problems:
        raise SpecError("; ".join(problems) + ".")


def _is_there(path: str) -> bool:
    """Whether a URL, which is looked at later, or a glob that stands for something."""
    return is_url(path) or (is_glob(path) and bool(glob_matches(path)))


def _resolve_path(text: str, folder: Path, key: str) -> str:
    """An absolute path, or a URL as it is; variables filled in."""
    if not is_url(text):
        return str(expand_path(text, folder, key))
    url = expand_text(text, key)
    refuse_credentials(url, key)
    return url


def _resolve_split(split: SplitSpec, folder: Path, key: str) -> SplitSpec:
    paths = [_resolve_path(path, folder, f"{key}.path") for path in split.paths]
    changes: dict[str, Any] = {"path": paths[0] if len(paths) == 1 else paths}
    references = split.reference_energies
    if references not in (PER_ELEMENT, NO_REFERENCES):
        file = expand_path(references, folder, f"{key}.reference_energies")
        if not file.is_file():
            raise SpecError(
                f"{key}.reference_energies is {references!r}; it is not "
                f"{PER_ELEMENT}, {NO_REFERENCES} or a file ({file})."
            )
        read_reference_energies(file)
        changes["reference_energies"] = str(file)
    if split.ids is not None:
        ids = expand_path(split.ids, folder, f"{key}.ids")
        read_ids(ids, f"{key}.ids")
        changes["ids"] = str(ids)
    return split.model_copy(update=changes)


def _check_profile(name: str, feature: FeatureSpec) -> None:
    if feature.profile != "faithful" and feature.dtype is not None:
        raise SpecError(
            f"features.{name}: dtype is for profile faithful, but {feature.profile} "
            "stores integers; remove dtype or profile."
        )
    if feature.profile != "compact" and feature.max_relative_error is not None:
        raise SpecError(
            f"features.{name}.max_relative_error is for profile compact; the error of "
            f"{feature.profile} is given, so remove the key."
        )
    if feature.profile != "faithful" and name not in CHANNEL_FIELDS.values():
        raise SpecError(
            f"features.{name}: profile {feature.profile} is for features with "
            "channels; set profile: faithful."
        )


def _check_columns(name: str, feature: FeatureSpec) -> None:
    if name in DERIVED_FIELDS:
        if feature.layer is not None:
            raise SpecError(
                f"features.{name}.layer: the field comes from forces and has no "
                "layer; remove the key."
            )
        return
    for key in ("columns", "step"):
        if getattr(feature, key) is not None:
            raise SpecError(
                f"features.{name}.{key} is for force_jacobian; remove the key."
            )


def _check_reading(split: SplitSpec, key: str) -> None:
    if split.forces_key is not None and split.gradient_key is not None:
        raise SpecError(
            f"{key} has forces_key and gradient_key; remove one of the two keys."
        )


def _check_features(
    split: SplitSpec, key: str, features: Mapping[str, FeatureSpec]
) -> None:
    named = [] if isinstance(split.features, bool) else split.features
    for name in named:
        if name not in features:
            raise SpecError(
                f"{key}.features: {name!r} is not under features: of the spec"
                f"{nearest(name, features)}; add it there, or remove it here."
            )


def _check_generated(split: SplitSpec, key: str, teacher: TeacherSpec | None) -> None:
    if split.generate is None:
        return
    if split.rattle is not None:
        raise SpecError(
            f"{key} has rattle and generate; remove rattle, or name its sigma in "
            f"{key}.generate with method: rattle."
        )
    if split.labels != "none":
        raise SpecError(
            f"{key}.generate: labels of the source are wrong for generated structures; "
            f"add {key}.labels: none, and store the labelled samples in another split."
        )
    if teacher is None:
        raise SpecError(
            f"{key}.generate needs a teacher, which labels the structures; add a "
            "teacher: section."
        )


def _check_choices(spec: CacheSpec) -> None:
    for name in spec.features:
        known = (*CACHEABLE_FIELDS, *DERIVED_FIELDS)
        if name not in known:
            raise SpecError(f"features: unknown field {name!r}{nearest(name, known)}.")
        _check_profile(name, spec.features[name])
        _check_columns(name, spec.features[name])
    if spec.features and spec.teacher is None:
        raise SpecError(
            "The spec has features: but no teacher: section; add the section or "
            "remove features:."
        )
    for name, split in spec.splits.items():
        if not name.isidentifier():
            raise SpecError(
                f"splits: the name {name!r} must have only letters, digits and '_'."
            )
        _check_reading(split, f"splits.{name}")
        if split.energy is not None and split.format != "oc20_raw":
            raise SpecError(
                f"splits.{name}.energy is for format oc20_raw, not for "
                f"{split.format}; remove it."
            )
        _check_features(split, f"splits.{name}", spec.features)
        _check_generated(split, f"splits.{name}", spec.teacher)
        if split.rattle is not None and split.labels == "all":
            raise SpecError(
                f"splits.{name}: labels of the source are wrong for rattled copies; "
                f"remove splits.{name}.labels and store the labelled samples in "
                "another split."
            )
        if not split.labelled and spec.teacher is None:
            raise SpecError(
                f"splits.{name} has neither labels of its source nor a teacher; add "
                "a teacher: section, or remove labels: none and rattle:."
            )
