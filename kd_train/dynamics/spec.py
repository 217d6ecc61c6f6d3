"""The file of ``kd-eval --dynamics``: what to run and what to allow."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field as Key
from pydantic import field_validator, model_validator

from pipeline.spec.yaml_model import ClosedModel, expand_path, read_yaml, validate

# Metrics with a threshold: title and unit of each, in the order of the table.
METRICS: Mapping[str, tuple[str, str]] = {
    "drift": ("drift of the total energy", "meV/atom/ps"),
    "energy_range": ("range of the total energy", "meV/atom"),
    "work_error": ("error of energy against work, random steps", "meV"),
    "step_error": ("error of energy against work, dynamics", "meV"),
    "order_error": ("dependence on the order of atoms", "meV"),
    "cell_error": ("dependence on the choice of cell", "meV"),
    "failed_replicas": ("number of failed replicas", ""),
    "rdf_difference": ("difference of radial distributions", ""),
    "ms_per_step": ("time of a step", "ms"),
}
_ONLY_NVE = ("drift", "energy_range")


class Thresholds(ClosedModel):
    """Largest value allowed of each metric; no default, so nothing is judged unasked.

    Metrics of replicas are the largest of all replicas.
    """

    drift: float | None = Key(
        None, ge=0, description="Drift of the total energy, in meV/atom/ps."
    )
    energy_range: float | None = Key(
        None, ge=0, description="Range of the total energy, in meV/atom."
    )
    work_error: float | None = Key(
        None,
        ge=0,
        description="Energy against work in small random steps, in meV a step.",
    )
    step_error: float | None = Key(
        None, ge=0, description="Energy against work in steps of the dynamics, in meV."
    )
    order_error: float | None = Key(
        None, ge=0, description="Dependence on the order of atoms, in meV."
    )
    cell_error: float | None = Key(
        None, ge=0, description="Dependence on the choice of cell, in meV."
    )
    failed_replicas: int | None = Key(
        None, ge=0, description="Number of failed replicas."
    )
    rdf_difference: float | None = Key(
        None, ge=0, description="Mean absolute difference of radial distributions."
    )
    ms_per_step: float | None = Key(None, ge=0, description="Time of a step, in ms.")


class FailureSpec(ClosedModel):
    """Signs by which a replica has failed."""

    close: float | None = Key(
        0.5,
        gt=0,
        lt=1,
        description="Minimum distance of two atoms, as a share of the sum of their "
        "covalent radii (default: 0.5); null for none.",
    )
    stretch: float | None = Key(
        1.5,
        gt=1,
        description="Maximum length of a bond, as a multiple of its length in the "
        "structure (default: 1.5); null for none, as in liquids of metals.",
    )
    heat: float | None = Key(
        5.0,
        gt=1,
        description="Maximum temperature, as a multiple of `temperature` (default: 5); "
        "null for none.",
    )


class WalkSpec(ClosedModel):
    """Small random steps along which energy is compared with work."""

    steps: int = Key(100, ge=1, description="Number of steps (default: 100).")
    displacement: float = Key(
        0.001,
        ge=1e-5,
        le=0.1,
        description="Standard deviation of displacements along each axis, in Å a step "
        "(default: 0.001).",
    )


class RdfSpec(ClosedModel):
    """Radial distribution function."""

    r_max: float = Key(
        6.0, gt=0, le=30, description="Largest distance, in Å (default: 6)."
    )
    bins: int = Key(120, ge=2, le=10_000, description="Number of bins (default: 120).")


class ReferenceSpec(ClosedModel):
    """What radial distributions are compared with: a teacher or a trajectory."""

    teacher: str | None = Key(
        None,
        description="Run folder or model file of this project; it runs the same "
        "replicas (default: none).",
    )
    trajectory: str | None = Key(
        None, description="File with frames of dynamics (default: none)."
    )

    @model_validator(mode="after")
    def _one(self) -> "ReferenceSpec":
        if (self.teacher is None) == (self.trajectory is None):
            raise ValueError("set either teacher or trajectory")
        return self


class DynamicsSpec(ClosedModel):
    """Content of a file of ``kd-eval --dynamics``; paths are relative to its folder."""

    structure: str = Key(description="File with the structure at the start.")
    index: int = Key(0, ge=0, description="Number of its frame (default: 0).")
    ensemble: Literal["nve", "langevin"] = Key(
        "nve",
        description="Dynamics: nve, constant energy | langevin, constant temperature "
        "(default: nve).",
    )
    temperature: float = Key(
        gt=0, le=20_000, description="Temperature at the start, in K."
    )
    timestep: float = Key(0.5, gt=0, le=100, description="Time step in fs.")
    steps: int | None = Key(
        None, ge=2, description="Number of steps of a replica, or set `duration`."
    )
    duration: float | None = Key(
        None, gt=0, description="Duration of a replica in ps, or set `steps`."
    )
    equilibration: int = Key(
        0,
        ge=0,
        description="Number of Langevin steps before those that count (default: 0).",
    )
    friction: float = Key(
        0.01,
        gt=0,
        le=10,
        description="Friction of Langevin dynamics, in 1/fs (default: 0.01).",
    )
    every: int = Key(
        10,
        ge=1,
        description="Number of steps between frames that are kept and checked "
        "(default: 10).",
    )
    replicas: int = Key(3, ge=1, le=10_000, description="Number of replicas.")
    seed: int = Key(0, ge=0, description="Random seed (default: 0).")
    dtype: Literal["float32", "float64"] = Key(
        "float32",
        description="Precision of the dynamics: float32 | float64 (default: float32).",
    )
    forces: Literal["model", "gradient"] = Key(
        "model",
        description="Forces of the student: model (as it predicts them) | gradient (of "
        "its energy, also if it has a force head) (default: model).",
    )
    walk: WalkSpec = Key(default_factory=WalkSpec)
    rdf: RdfSpec = Key(default_factory=RdfSpec)
    failure: FailureSpec = Key(default_factory=FailureSpec)
    reference: ReferenceSpec | None = Key(
        None, description="Teacher or trajectory for comparison (default: none)."
    )
    thresholds: Thresholds = Key(default_factory=Thresholds)

    @field_validator("thresholds", "failure", "walk", "rdf", mode="before")
    @classmethod
    def _empty_section(cls, value: object) -> object:
        # A section whose lines are all comments is null in YAML.
        return {} if value is None else value

    @model_validator(mode="after")
    def _consistent(self) -> "DynamicsSpec":
        if (self.steps is None) == (self.duration is None):
            raise ValueError("set either steps or duration")
        if self.n_steps < 2:
            raise ValueError("duration must be at least two time steps")
        if self.every > self.n_steps:
            raise ValueError(
                f"every is {self.every}, more than the {self.n_steps} steps of a "
                "replica"
            )
        for name in _ONLY_NVE:
            wanted = getattr(self.thresholds, name) is not None
            if wanted and self.ensemble != "nve":
                raise ValueError(
                    f"thresholds.{name} needs ensemble: nve, because Langevin dynamics "
                    "changes the total energy"
                )
        if self.thresholds.rdf_difference is not None and self.reference is None:
            raise ValueError("thresholds.rdf_difference needs a reference")
        return self

    @property
    def n_steps(self) -> int:
        """Steps of a replica that count, without equilibration."""
        if self.steps is not None:
            return self.steps
        assert self.duration is not None
        return round(1000 * self.duration / self.timestep)


def load_dynamics(path: Path) -> DynamicsSpec:
    """Read the file at ``path``; its paths become absolute.

    Raises
    ------
    SpecError
        A key or a value is wrong.
    """
    spec = validate(DynamicsSpec, read_yaml(path), str(path))
    folder = path.resolve().parent
    changes: dict[str, object] = {
        "structure": str(expand_path(spec.structure, folder, "structure"))
    }
    if spec.reference is not None:
        paths = {
            key: str(expand_path(text, folder, f"reference.{key}"))
            for key, text in spec.reference.model_dump().items()
            if text is not None
        }
        changes["reference"] = spec.reference.model_copy(update=paths)
    return spec.model_copy(update=changes)
