"""``CacheSpec``: what a store is made of, read from ``cache_specs/*.yaml``."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field as Key
from pydantic import field_validator

from pipeline.errors import SpecError
from pipeline.fields import CACHEABLE_FIELDS, FIELDS
from pipeline.files.globs import glob_matches, is_glob
from pipeline.files.remote import is_url, refuse_credentials
from pipeline.spec.formats import FORMATS
from pipeline.spec.reference_energies import read_reference_energies
from pipeline.spec.renamed_keys import rename_keys
from pipeline.spec.units_spec import UnitsSpec
from pipeline.spec.yaml_model import (
    ClosedModel,
    apply_overrides,
    expand_path,
    expand_text,
    nearest,
    read_yaml,
    validate,
)

PER_ELEMENT, NO_REFERENCES = "per_element", "none"
COMPACT_ERROR = 1e-3
# Genuine relaxations of OC20 begin at 0.42, collisions of molecules stay above 0.6.
MIN_PAIR_DISTANCE = 0.4
Scalar = bool | int | float | str


class TeacherSpec(ClosedModel):
    """Which network is run, and how."""

    earlier_keys: ClassVar[Mapping[str, str]] = {"batch_gib": "max_batch_gib"}

    model: str = Key(
        description="Name of the teacher: gemnet_oc | painn | schnet | "
        "sevennet | chgnet | mace | fairchem | an installed "
        "plug-in."
    )
    checkpoint: str | None = Key(
        None,
        description="File of weights: OCP/fairchem-1.x .pt, our .safetensors, "
        "or the format of the plug-in (default: the weights in the "
        "plug-in's package).",
    )
    options: dict[str, Any] = Key(
        default_factory=dict,
        description="Options of the plug-in, listed in docs/teachers.md "
        "(default: none).",
    )
    source: str | None = Key(
        None,
        description="Address at which the checkpoint is published (default: none).",
    )
    scale_file: str | None = Key(
        None,
        description="File of scale factors, for checkpoints without them "
        "(default: none).",
    )
    precision: Literal["float32", "tf32", "bfloat16"] = Key(
        "float32",
        description="Precision of matrix products. kd-cache measures and "
        "stores its error.",
    )
    weights: Literal["ema", "raw"] = Key(
        "ema",
        description="Weights to load: ema, the moving average if the file has "
        "one, or raw, the last step.",
    )
    batch_atoms: int = Key(
        2048, ge=1, description="Maximum number of atoms in one forward pass."
    )
    max_batch_gib: float = Key(
        4.0,
        gt=0,
        description="Maximum memory of one forward pass in GiB, by an estimate.",
    )


class RattleSpec(ClosedModel):
    """Copies of structures whose free atoms are displaced at random."""

    copies: int = Key(
        ge=1,
        description="Number of copies of every sample. The original sample is not "
        "stored.",
    )
    sigma: float = Key(
        ge=1e-3,
        lt=1,
        description="Standard deviation of the displacements along each axis, in Å.",
    )
    seed: int = Key(0, ge=0, description="Random seed of the displacements.")


class SplitSpec(ClosedModel):
    """One dataset, stored as one group."""

    earlier_keys: ClassVar[Mapping[str, str]] = {
        "compare_energies": "check_energy_kind"
    }

    format: str = Key(
        description=f"Format of the files: {' | '.join(FORMATS.built_in)} | the name "
        "of an installed plug-in. Text may be packed.",
        examples=list(FORMATS.built_in),
    )
    path: str | list[str] = Key(
        description="File, folder, URL or glob (* ? [), or a list of these. "
        "Relative paths start at the folder of the spec."
    )
    source: str | None = Key(
        None, description="Address at which the data are published (default: none)."
    )
    features: bool = Key(
        True,
        description="Whether features are stored. If false, the split has "
        "structures, labels, teacher energy and teacher forces.",
    )
    offset: int = Key(0, ge=0, description="Number of samples to skip at the start.")
    limit: int | None = Key(
        None, ge=1, description="Maximum number of samples (default: all)."
    )
    every: int = Key(
        1,
        ge=1,
        description="Step between samples: 1 reads all samples, n reads every n-th "
        "sample.",
    )
    energy: Literal["adsorption", "total"] | None = Key(
        None,
        description="Kind of energy of oc20_raw (default: adsorption if the "
        "folder has .txt files of reference energies).",
    )
    energy_key: str | None = Key(
        None, description="Name of the energy in the files (default: energy)."
    )
    forces_key: str | None = Key(
        None, description="Name of the forces in the files (default: forces)."
    )
    gradient_key: str | None = Key(
        None,
        description="Name of the energy gradient in the files, instead of "
        "forces_key. Forces are the negative gradient (default: "
        "none).",
    )
    units: UnitsSpec = Key(
        default_factory=UnitsSpec,
        description="Units of the files: {energy, length, forces}.",
    )
    where: dict[str, Scalar | list[Scalar]] = Key(
        default_factory=dict,
        description="Values that a frame must have to be read: {key: value or "
        "[values]} (default: all frames).",
    )
    reference_energies: str = Key(
        PER_ELEMENT,
        description="Reference energies of the elements: per_element (least "
        "squares) | none | FILE, a JSON or YAML map from element "
        "to eV. They are stored next to the labels.",
    )
    check_energy_kind: bool = Key(
        True,
        description="Whether energies must be of the same kind as in other splits.",
    )
    on_bad_sample: Literal["fail", "skip"] = Key(
        "fail",
        description="Action for samples that cannot be read, have unknown "
        "elements, no neighbours or atoms too close: fail, or skip "
        "the sample and record its name in the store.",
    )
    min_pair_distance: float | None = Key(
        MIN_PAIR_DISTANCE,
        ge=0,
        lt=1,
        description="Minimum distance of two atoms, as a share of the sum of "
        "their covalent radii. Samples with closer atoms are bad "
        "samples; 0 or null switches the check off.",
    )
    labels: Literal["all", "none"] | None = Key(
        None,
        description="Labels of the source to store: all | none. With none, the "
        "teacher alone labels the samples (default: all, or none "
        "for rattled samples).",
    )
    pbc: Literal["none"] | None = Key(
        None,
        description="Periodicity: none makes every structure a molecule and "
        "ignores the periodic flags of the files (default: the "
        "flags of the files).",
    )
    rattle: RattleSpec | None = Key(
        None,
        description="Displaced copies to store instead of the samples (default: none).",
    )

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        if value not in FORMATS.names():
            raise ValueError(f"unknown dataset format{FORMATS.known()}")
        return value

    @field_validator("path", mode="before")
    @classmethod
    def _texts(cls, value: object) -> object:
        parts = value if isinstance(value, list) else [value]
        if not parts or not all(isinstance(part, str) and part for part in parts):
            raise ValueError("must be a path or a list of paths")
        return value

    @field_validator("where", mode="before")
    @classmethod
    def _values(cls, value: object) -> object:
        if not isinstance(value, dict):
            raise ValueError("must be a map from keys of frames to values")
        for key, wanted in value.items():
            parts = wanted if isinstance(wanted, list) else [wanted]
            if not parts or not all(
                isinstance(p, bool | int | float | str) for p in parts
            ):
                raise ValueError(f"{key!r} needs a number, a text, a flag or a list")
        return value

    @property
    def paths(self) -> list[str]:
        """What ``path`` names, one or several."""
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def conditions(self) -> tuple[tuple[str, tuple[Scalar, ...]], ...]:
        """``where``, every key with all values that are wanted of it."""
        return tuple(
            (key, tuple(value) if isinstance(value, list) else (value,))
            for key, value in self.where.items()
        )

    @property
    def labelled(self) -> bool:
        """Whether labels of the source are stored."""
        return self.labels != "none" and self.rattle is None


class FeatureSpec(ClosedModel):
    """How one field is stored."""

    earlier_keys: ClassVar[Mapping[str, str]] = {"error": "max_relative_error"}

    profile: Literal["faithful", "q8", "compact"] = Key(
        "faithful",
        description="Storage of the field: faithful, as computed, in dtype | "
        "q8, int8 and a scale for every atom, a quarter of float32 "
        "| compact, compressed to the given error.",
    )
    max_relative_error: float | None = Key(
        None,
        gt=0,
        lt=1,
        description="Maximum squared error of compact, relative to the "
        f"variance (default: {COMPACT_ERROR:g}).",
    )
    layer: str | None = Key(
        None,
        description="Layer of the teacher (default: the layer that the paper "
        "distils from).",
    )
    dtype: Literal["float16", "float32"] | None = Key(
        None, description="Number type of faithful (default: the type of the field)."
    )

    @property
    def stated_error(self) -> float | None:
        """Error that ``compact`` is to keep; None for the other profiles."""
        if self.profile != "compact":
            return None
        error = self.max_relative_error
        return COMPACT_ERROR if error is None else error


class StoreSpec(ClosedModel):
    """Where the store lies and how it is cut."""

    path: str
    rows_per_block: int = Key(131072, ge=1024, multiple_of=1024)
    seed: int = Key(0, ge=0, description="Random seed of the permutation of samples.")


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
    if feature.profile != "faithful" and None not in FIELDS[name].shape:
        raise SpecError(
            f"features.{name}: profile {feature.profile} is for features with "
            "channels; set profile: faithful."
        )


def _check_reading(split: SplitSpec, key: str) -> None:
    if split.forces_key is not None and split.gradient_key is not None:
        raise SpecError(
            f"{key} has forces_key and gradient_key; remove one of the two keys."
        )


def _check_choices(spec: CacheSpec) -> None:
    for name in spec.features:
        if name not in CACHEABLE_FIELDS:
            hint = nearest(name, CACHEABLE_FIELDS)
            raise SpecError(f"features: unknown field {name!r}{hint}.")
        _check_profile(name, spec.features[name])
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
