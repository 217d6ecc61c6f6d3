"""Sections of a spec: teacher, splits, features and store."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field as Key
from pydantic import StrictBool, field_validator

from pipeline.spec.closed_model import ClosedModel
from pipeline.spec.formats import FORMATS
from pipeline.spec.generate_spec import GenerateSpec
from pipeline.spec.units_spec import UnitsSpec

PER_ELEMENT, NO_REFERENCES = "per_element", "none"
COMPACT_ERROR = 1e-3
# Genuine relaxations of OC20 begin at 0.42, collisions of molecules stay above 0.6.
MIN_PAIR_DISTANCE = 0.4
DEFAULT_COLUMNS = 4
# Truncation grows with the square of the step, rounding with its inverse. For networks
# in single precision 0.01 Å has a relative error of about 1e-3.
DEFAULT_STEP = 0.01
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
    features: StrictBool | list[str] = Key(
        True,
        description="Features that are stored: true, all of the spec | false, none | "
        "a list of their names. Structures, labels, teacher energy and teacher forces "
        "are always stored (default: true).",
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
    ids: str | None = Key(
        None,
        description="File with the ids of the samples to read, one id a line, of those "
        "that where, offset, every and limit choose (default: all).",
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
    virial_key: str | None = Key(
        None,
        description="Name of the virial in the files, in the unit of energies; none "
        "reads neither virial nor stress (default: virial or virials).",
    )
    stress_key: str | None = Key(
        None,
        description="Name of the stress in the files, positive in tension "
        "(default: stress).",
    )
    units: UnitsSpec = Key(
        default_factory=UnitsSpec,
        description="Units of the files: {energy, length, forces, stress}.",
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
        description="Displaced copies to store instead of the samples, without a "
        "screen: the earlier form of generate (default: none).",
    )
    generate: GenerateSpec | None = Key(
        None,
        description="Structures to make from the samples and to store instead of "
        "them. Needs labels: none (default: none).",
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
        return self.labels != "none" and self.rattle is None and self.generate is None


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
    columns: int | None = Key(
        None,
        ge=1,
        description="Number of columns of force_jacobian of each structure "
        f"(default: {DEFAULT_COLUMNS}). A column costs two teacher passes.",
    )
    step: float | None = Key(
        None,
        ge=1e-4,
        le=0.1,
        description="Displacement of an atom for force_jacobian, in Å "
        f"(default: {DEFAULT_STEP:g}).",
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
