"""A student in TorchSim: many structures in one pass."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_train.evaluation.potential import StudentPotential
from pipeline.structure import Structure

try:
    from torch_sim.models.interface import ModelInterface
    from torch_sim.state import SimState
except ImportError as error:
    raise ImportError(
        f"TorchSim cannot be imported ({error}); install it with "
        "`pip install 'kd-train[torch-sim]'`."
    ) from error


class StudentModel(ModelInterface):
    """Model of TorchSim around a student.

    Parameters
    ----------
    model
        A run folder or a model file.
    device
        ``cpu``, ``cuda`` or ``cuda:1`` (default: a GPU if there is one).
    dtype
        ``float64`` or ``float32``, as text or as a type of torch; that of the states.
    compute_forces, compute_stress
        Whether results have forces and stress. Both cost one pass together.
    **options
        ``any_element``, ``forces`` of `StudentPotential`, whose errors are raised.
    """

    def __init__(
        self,
        model: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float64",
        *,
        compute_forces: bool = True,
        compute_stress: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        place = None if device is None else str(device)
        kind = str(dtype).removeprefix("torch.")
        self.potential = StudentPotential(model, device=place, dtype=kind, **options)
        self._device, self._dtype = self.potential.device, self.potential.dtype
        self._compute_forces = compute_forces
        self._compute_stress = compute_stress

    @property
    def compute_forces(self) -> bool:
        """Whether results have forces."""
        return self._compute_forces

    @compute_forces.setter
    def compute_forces(self, value: bool) -> None:
        self._compute_forces = value

    @property
    def compute_stress(self) -> bool:
        """Whether results have stress."""
        return self._compute_stress

    @compute_stress.setter
    def compute_stress(self, value: bool) -> None:
        self._compute_stress = value

    def forward(self, state: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return ``energy`` (B,), ``forces`` (N, 3) and ``stress`` (B, 3, 3).

        In eV, eV/Å and eV/Å³. Stress is zero unless all three directions are periodic.

        Raises
        ------
        DataError
            A structure cannot be evaluated, as in `StudentPotential.evaluate`.
        """
        if isinstance(state, dict):
            masses = torch.ones_like(state["positions"][:, 0])
            state = SimState(**({"masses": masses} | state))
        structures = self._structures(state)
        result = self.potential.evaluate_batch(structures)
        output = {"energy": result.energy.to(self._dtype)}
        if self._compute_forces:
            output["forces"] = result.forces
        if self._compute_stress:
            output["stress"] = _stress(result.virial, structures)
        return output

    def _structures(self, state: Any) -> list[Structure]:
        """Split a state into its structures."""
        sizes = torch.bincount(state.system_idx).cpu().numpy()
        ends = np.cumsum(sizes)[:-1]
        numbers = np.split(state.atomic_numbers.cpu().numpy(), ends)
        positions = np.split(state.positions.detach().double().cpu().numpy(), ends)
        cells = state.row_vector_cell.detach().double().cpu().numpy()
        pbc = torch.as_tensor(state.pbc).expand(3).cpu().numpy()
        return [
            self.potential.structure(*parts, pbc)
            for parts in zip(numbers, positions, cells, strict=True)
        ]


def _stress(virial: Tensor, structures: list[Structure]) -> Tensor:
    """Return minus the virials (B, 3, 3) over the volumes, 0 if not periodic."""
    volumes = [
        abs(float(np.linalg.det(s.cell))) if s.pbc.all() else np.inf for s in structures
    ]
    volume = torch.tensor(volumes, dtype=virial.dtype, device=virial.device)
    return -virial / volume[:, None, None]
