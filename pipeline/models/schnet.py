"""SchNet in the variant of the Open Catalyst Project."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.utils import scatter

from pipeline.errors import SpecError
from pipeline.graphs.neighbors import NeighborSpec
from pipeline.models.derivatives import differentiate
from pipeline.models.layers import (
    GaussianSmearing,
    ShiftedSoftplus,
    cosine_cutoff,
    edge_vectors,
    full_precision,
    reset_linear,
)
from pipeline.models.messages import Pairs
from pipeline.models.network import Network
from pipeline.models.output import ModelOutput

_NUM_EMBEDDINGS = 100  # indexed by the atomic number itself, row 0 unused


@dataclass(frozen=True)
class SchNetOptions:
    """Hyperparameters under the names that released checkpoints use; cutoff in Å.

    ``max_neighbors`` is fixed in the released code and ours to set; None is no limit.
    """

    hidden_channels: int = 128
    num_filters: int = 128
    num_interactions: int = 6
    num_gaussians: int = 50
    cutoff: float = 10.0
    max_neighbors: int | None = 50
    readout: str = "add"
    regress_forces: bool = True
    use_pbc: bool = True


class SchNet(Network):
    """Continuous-filter convolutions on distances (arXiv:1706.08566).

    Computes what the released OCP checkpoints compute: unscaled Gaussians, a cosine
    cutoff on the filters, at most ``max_neighbors`` sources per target. Forces are
    ``-dE/dx`` at a fixed neighbour list. The energy is (B,), not (B, 1).
    """

    def __init__(self, **hyperparameters: Any) -> None:
        super().__init__()
        options = SchNetOptions(**hyperparameters)
        if options.readout not in ("add", "sum", "mean"):
            raise SpecError(f"Readout {options.readout!r} is not add, sum or mean.")
        if options.hidden_channels < 2:
            raise SpecError(
                f"schnet.hidden_channels is {options.hidden_channels}, but at least "
                "2 are needed, since the last layers have half of them."
            )
        self.options = options
        self.hyperparameters = asdict(options)
        self.graph_rule = NeighborSpec(
            options.cutoff,
            options.max_neighbors,
            symmetric=False,
            periodic=options.use_pbc,
        )
        width = options.hidden_channels
        self.widths = {"node_features": width}
        self.elements = range(1, _NUM_EMBEDDINGS)
        self.layers = tuple(f"i{k + 1}" for k in range(options.num_interactions))
        self.embedding = nn.Embedding(_NUM_EMBEDDINGS, width)
        self.distance_expansion = GaussianSmearing(
            options.cutoff, options.num_gaussians
        )
        self.interactions = nn.ModuleList(
            SchNetInteraction(width, options.num_gaussians, options.num_filters)
            for _ in range(options.num_interactions)
        )
        self.lin1 = nn.Linear(width, width // 2)
        self.act = ShiftedSoftplus()
        self.lin2 = nn.Linear(width // 2, 1)
        reset_linear(self)

    def forward(
        self, batch: Data, layers: Mapping[str, str] | None = None
    ) -> ModelOutput:
        """Predictions and the state after the last interaction, in network units.

        ``layers`` takes the state from another layer: ``i<k>`` after interaction k.
        """
        if self.options.regress_forces:
            return differentiate(self, batch, layers or {})
        output = self.predict_energies(batch, layers)
        return output if torch.is_grad_enabled() else output.detached()

    def predict_energies(
        self, batch: Data, layers: Mapping[str, str] | None = None
    ) -> ModelOutput:
        """Outputs without forces, differentiable by ``positions`` and ``cell``."""
        states: dict[str, Tensor] = {}
        energy, per_atom, h = self._energy(batch, batch.positions, states)
        if layers:
            h = states[layers["node_features"]]
        return ModelOutput(energy, None, per_atom, h, vector_features=None)

    def node_states(self, batch: Data) -> dict[str, Tensor]:
        """States (N, H) after all interactions, without forces."""
        states: dict[str, Tensor] = {}
        self._energy(batch, batch.positions, states)
        return states

    def _energy(
        self, batch: Data, positions: Tensor, states: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """Energies (B,) and per atom (N,), and the final state (N, H).

        Notes the states of all layers in ``states``.
        """
        pairs = Pairs.of(batch)
        vectors = edge_vectors(batch, positions)[pairs.edge]  # (P, 3)
        distance = torch.linalg.vector_norm(vectors, dim=1)
        basis = self.distance_expansion(distance)  # (P, G)
        cutoff = cosine_cutoff(distance, self.options.cutoff)[:, None]
        h = self.embedding(batch.atomic_numbers)
        for k, interaction in enumerate(self.interactions, 1):
            h = h + interaction(h, pairs, basis, cutoff)
            states[f"i{k}"] = h
        with full_precision(h):
            per_atom = self.lin2(self.act(self.lin1(h))).squeeze(1)
        reduce = "mean" if self.options.readout == "mean" else "sum"
        energy = scatter(
            per_atom, batch.batch, dim=0, dim_size=batch.num_graphs, reduce=reduce
        )
        return energy, per_atom, h


class SchNetInteraction(nn.Module):
    """One convolution over neighbours and the atom-wise layers after it."""

    def __init__(self, width: int, num_gaussians: int, num_filters: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(num_gaussians, num_filters),
            ShiftedSoftplus(),
            nn.Linear(num_filters, num_filters),
        )
        self.conv = nn.ModuleDict(
            {
                "lin1": nn.Linear(width, num_filters, bias=False),
                "lin2": nn.Linear(num_filters, width),
            }
        )
        self.act = ShiftedSoftplus()
        self.lin = nn.Linear(width, width)

    def forward(self, h: Tensor, pairs: Pairs, basis: Tensor, cutoff: Tensor) -> Tensor:
        """Change of the states (N, H), given basis (P, G) and cutoff (P, 1)."""
        filters = self.mlp(basis) * cutoff  # (P, F)
        z = pairs.sum_messages(self.conv["lin1"](h), filters)  # (N, F)
        return self.lin(self.act(self.conv["lin2"](z)))  # (N, H)
