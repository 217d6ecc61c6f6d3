"""What every model returns."""

from dataclasses import dataclass

import torch


@dataclass
class ModelOutput:
    """Predictions and hidden states of one batch, all in the network's own units.

    ``energy`` (B,), ``forces`` (N, 3) or None, ``per_atom_energy`` (N,),
    ``node_features`` (N, C), ``vector_features`` (N, 3, C) or None. Energies and forces
    become eV and eV/Å through :class:`~pipeline.models.normalizer.Normalizer`.
    """

    energy: torch.Tensor
    forces: torch.Tensor | None
    per_atom_energy: torch.Tensor
    node_features: torch.Tensor
    vector_features: torch.Tensor | None
