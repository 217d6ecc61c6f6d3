"""Section ``generate`` of a split: structures that stage one makes from the samples."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field as Key
from pydantic import model_validator

from pipeline.spec.closed_model import ClosedModel

Method = Literal["rattle", "normal_modes", "md", "rattle_relax"]
# Keys of a method that not all methods have, with their defaults.
METHOD_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "rattle": {"sigma": 0.05},
    "normal_modes": {
        "temperature": 500.0,
        "min_curvature": 1.0,
        "step": 0.01,
        "max_hessian_atoms": 32,
    },
    "md": {
        "temperature": 500.0,
        "every": 10,
        "steps": None,
        "timestep": 0.5,
        "friction": 0.02,
    },
    "rattle_relax": {"sigma": 0.1, "relax_steps": 3},
}
_OWN = frozenset(key for keys in METHOD_DEFAULTS.values() for key in keys)


def _default(key: str) -> str:
    """Return the defaults of ``key`` in words, by method."""
    found = {m: keys[key] for m, keys in METHOD_DEFAULTS.items() if key in keys}
    if len(set(found.values())) == 1:
        return f"{next(iter(found.values())):g}"
    return ", ".join(f"{value:g} for {method}" for method, value in found.items())


class GenerateSpec(ClosedModel):
    """Generated structures: copies of the samples with displaced atoms."""

    method: Method = Key(
        description="Method: rattle, Gaussian displacements | normal_modes, thermal "
        "displacements along the teacher's normal modes | md, Langevin dynamics with "
        "the teacher | rattle_relax, displacements and a few steps downhill in turn."
    )
    copies: int = Key(
        8, ge=1, description="Number of structures made from each sample (default: 8)."
    )
    seed: int = Key(0, ge=0, description="Random seed (default: 0).")
    sigma: float | None = Key(
        None,
        ge=1e-3,
        lt=1,
        description="Standard deviation of displacements along each axis, in Å "
        f"(default: {_default('sigma')}).",
    )
    temperature: float | None = Key(
        None,
        gt=0,
        le=20_000,
        description="Temperature of normal_modes and md, in K "
        f"(default: {_default('temperature')}).",
    )
    min_curvature: float | None = Key(
        None,
        gt=0,
        description="Minimum of the absolute curvature of a normal mode, in eV/Å² "
        f"(default: {_default('min_curvature')}).",
    )
    step: float | None = Key(
        None,
        ge=1e-4,
        le=0.1,
        description="Displacement for the Hessian, in Å "
        f"(default: {_default('step')}).",
    )
    max_hessian_atoms: int | None = Key(
        None,
        ge=1,
        description="Maximum number of atoms in a Hessian. Of larger samples, a random "
        "free atom and its nearest free neighbours move "
        f"(default: {_default('max_hessian_atoms')}).",
    )
    every: int | None = Key(
        None,
        ge=1,
        description=f"Steps of md between copies (default: {_default('every')}).",
    )
    steps: int | None = Key(
        None,
        ge=1,
        description="Steps of md for each sample; the copies are the last frames "
        "(default: copies * every).",
    )
    timestep: float | None = Key(
        None,
        gt=0,
        le=10,
        description=f"Time step of md, in fs (default: {_default('timestep')}).",
    )
    friction: float | None = Key(
        None,
        gt=0,
        description="Friction of Langevin dynamics, in 1/fs "
        f"(default: {_default('friction')}).",
    )
    relax_steps: int | None = Key(
        None,
        ge=1,
        description="Steps downhill after each displacement of rattle_relax "
        f"(default: {_default('relax_steps')}).",
    )
    cell_sigma: float | None = Key(
        None,
        gt=0,
        lt=0.3,
        description="Standard deviation of the components of a random symmetric "
        "strain. Only for three periodic directions (default: no strain).",
    )
    max_force: float | None = Key(
        None,
        gt=0,
        description="Maximum force on an atom of a copy by the teacher, in eV/Å "
        "(default: 15, or twice the largest force on an atom of the sample).",
    )
    max_energy_rise: float | None = Key(
        None,
        gt=0,
        description="Maximum rise of the teacher's energy from the sample to a copy, "
        "in eV per free atom (default: 0.5).",
    )

    _METHOD_KEYS: ClassVar[Mapping[str, Mapping[str, Any]]] = METHOD_DEFAULTS

    @model_validator(mode="after")
    def _keys_of_the_method(self) -> "GenerateSpec":
        known = self._METHOD_KEYS[self.method]
        for key in sorted(_OWN - known.keys()):
            if getattr(self, key) is not None:
                others = [m for m, keys in self._METHOD_KEYS.items() if key in keys]
                raise ValueError(
                    f"{key} is for method {' and '.join(others)}, not for "
                    f"{self.method}; remove the key"
                )
        steps = self.setting("steps") if "steps" in known else None
        if steps is not None and steps < self.copies * self.setting("every"):
            raise ValueError(
                f"steps is {steps}, but {self.copies} copies every "
                f"{self.setting('every')} steps need "
                f"{self.copies * self.setting('every')}; raise steps"
            )
        return self

    def setting(self, key: str) -> Any:
        """Return the value of a key of the method, or its default."""
        value = getattr(self, key)
        return self._METHOD_KEYS[self.method][key] if value is None else value
