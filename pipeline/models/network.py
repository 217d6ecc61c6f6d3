"""What every network offers beside its forward pass."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch_geometric.data import Data

from pipeline.graphs.neighbors import Edges, NeighborSpec
from pipeline.models.output import ModelOutput


class Network(nn.Module):
    """A potential that reads the graphs of ``pipeline.graphs`` and gives ModelOutput.

    ``graph_rule`` says how its edges are built, ``hyperparameters`` (JSON-able) rebuild
    it, ``widths`` are the channels of the hidden states it offers by field name,
    ``elements`` the atomic numbers it can embed, and ``layers`` the names of the layers
    that features may be taken from. A network with ``is_fitted = False`` wants
    :meth:`fit` before its training.
    """

    graph_rule: NeighborSpec
    hyperparameters: dict[str, Any]
    widths: dict[str, int]
    elements: range
    layers: tuple[str, ...] = ()
    is_fitted = True

    def forward(
        self, batch: Data, layers: Mapping[str, str] | None = None
    ) -> ModelOutput:
        """Outputs in network units; ``layers`` names the layer of some features."""
        raise NotImplementedError

    def predict_energies(
        self, batch: Data, layers: Mapping[str, str] | None = None
    ) -> ModelOutput:
        """Outputs without forces, differentiable by ``positions`` and ``cell``.

        `pipeline.models.derivatives.predict_gradients` differentiates their energy.
        """
        raise NotImplementedError

    def node_states(self, batch: Data) -> dict[str, Tensor]:
        """``node_features`` (N, C) at every one of ``layers``, in order of depth.

        One pass for all of them, without forces.
        """
        raise NotImplementedError

    def layer_width(self, field: str, layer: str) -> int | None:
        """Width of ``field`` at one of ``layers``; None where it does not exist."""
        return self.widths.get(field) if layer in self.layers else None

    def estimate_memory(self, edges: Edges, n_atoms: int) -> int:
        """Bytes that one structure adds to the peak of a pass without gradients.

        0 where the number of atoms alone limits batches.
        """
        return 0

    def fit(self, batch: Data) -> None:
        """Set what a fresh network draws from data instead of at random.

        Nothing here; networks with fitted scale factors override it.
        """
