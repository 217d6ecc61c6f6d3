"""Conversion between a network's own units and eV, eV/Å."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch_geometric.utils import scatter

from pipeline.errors import CheckpointError

NUM_REFERENCES = 119  # indexed by atomic number, 0 unused


@dataclass(frozen=True)
class Normalizer:
    """``E = out * energy_std + energy_mean + sum of element_references[Z]``.

    Mean, deviations and references in eV (forces eV/Å); ``element_references`` has 119
    entries, indexed by atomic number. Forces have no mean.
    """

    energy_mean: float = 0.0
    energy_std: float = 1.0
    force_std: float = 1.0
    element_references: tuple[float, ...] = (0.0,) * NUM_REFERENCES

    def __post_init__(self) -> None:
        numbers = (self.energy_mean, self.energy_std, self.force_std)
        if not all(math.isfinite(x) for x in (*numbers, *self.element_references)):
            raise CheckpointError("The normaliser holds a number that is not finite.")
        if self.energy_std <= 0 or self.force_std <= 0:
            raise CheckpointError(
                f"The normaliser's deviations are {self.energy_std} and "
                f"{self.force_std}, but both must be positive."
            )
        if len(self.element_references) != NUM_REFERENCES:
            raise CheckpointError(
                f"The normaliser has {len(self.element_references)} element "
                f"references, but {NUM_REFERENCES} are needed, one per atomic number."
            )

    def normalize_energy(
        self, energy: Tensor, atomic_numbers: Tensor, batch: Tensor
    ) -> Tensor:
        """Network energies (B,) float64 of energies in eV."""
        offset = self._offset(energy, atomic_numbers, batch)
        return (energy.double() - offset) / self.energy_std

    def denormalize_energy(
        self, energy: Tensor, atomic_numbers: Tensor, batch: Tensor
    ) -> Tensor:
        """Energies (B,) float64 in eV of network energies."""
        offset = self._offset(energy, atomic_numbers, batch)
        return energy.double() * self.energy_std + offset

    def normalize_forces(self, forces: Tensor) -> Tensor:
        """Network forces of forces in eV/Å; any shape, dtype kept."""
        return forces / self.force_std

    def denormalize_forces(self, forces: Tensor) -> Tensor:
        """Physical forces in eV/Å of network forces; any shape, dtype kept."""
        return forces * self.force_std

    def denormalize_virial(self, virial: Tensor) -> Tensor:
        """Virials in eV of network virials (B, 3, 3), by the scale of the energy."""
        return virial * self.energy_std

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form that :meth:`from_dict` reads."""
        return {**asdict(self), "element_references": list(self.element_references)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Normalizer":
        """Normaliser of :meth:`to_dict`'s result; anything else is refused."""
        known = {field.name for field in fields(cls)}
        try:
            if set(values) != known:
                raise ValueError(f"it has the keys {sorted(values)}")
            return cls(
                energy_mean=float(values["energy_mean"]),
                energy_std=float(values["energy_std"]),
                force_std=float(values["force_std"]),
                element_references=tuple(map(float, values["element_references"])),
            )
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"A normaliser cannot be read ({error}); it needs {sorted(known)}."
            ) from error

    def _offset(
        self, energy: Tensor, atomic_numbers: Tensor, batch: Tensor
    ) -> Tensor | float:
        """Sum of the mean and the references of each structure, in eV."""
        if not any(self.element_references):
            return self.energy_mean
        references = torch.tensor(
            self.element_references, dtype=torch.float64, device=energy.device
        )
        per_atom = references[atomic_numbers]
        # Not len(energy): of a pass that is recorded it would become a constant.
        total = scatter(per_atom, batch, dim=0, dim_size=energy.shape[0])
        return total + self.energy_mean
