"""What every model returns."""

from dataclasses import dataclass, fields, replace

import torch


@dataclass
class ModelOutput:
    """Predictions and hidden states of one batch, all in the network's own units.

    ``energy`` (B,), ``forces`` (N, 3) or None, ``per_atom_energy`` (N,),
    ``node_features`` (N, C), ``vector_features`` (N, 3, C) or None; of models with edge
    states ``edge_features`` (E, C) on the batch's edges and ``edge_to_node_features``
    (N, C), their sums over the edges into each atom. Models whose forces are the
    gradient of their energy have ``virial`` (B, 3, 3): minus the derivative of the
    energy with respect to a symmetric strain. Values become eV and eV/Å through
    :class:`~pipeline.models.normalizer.Normalizer`.
    """

    energy: torch.Tensor
    forces: torch.Tensor | None
    per_atom_energy: torch.Tensor
    node_features: torch.Tensor
    vector_features: torch.Tensor | None
    edge_features: torch.Tensor | None = None
    edge_to_node_features: torch.Tensor | None = None
    virial: torch.Tensor | None = None

    def detached(self) -> "ModelOutput":
        """The same values without a graph for gradients."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        present = {name: v.detach() for name, v in values.items() if v is not None}
        return replace(self, **present)
