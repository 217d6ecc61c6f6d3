"""PaiNN in the variant of the Open Catalyst Project."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch_geometric.data import Data
from torch_geometric.utils import scatter

from pipeline.errors import SpecError
from pipeline.graphs.neighbors import NeighborSpec
from pipeline.models.derivatives import differentiate
from pipeline.models.fused import FusedMessage, FusedUpdate, fused_library
from pipeline.models.fused_edges import fused_edges
from pipeline.models.layers import (
    AtomEmbedding,
    RadialBasis,
    ScaledSiLU,
    ScaleFactor,
    edge_vectors,
    envelope_exponent,
    full_precision,
    reset_linear,
    vector_norm,
)
from pipeline.models.messages import EdgeTensors, Pairs, sum_messages
from pipeline.models.network import Network
from pipeline.models.output import ModelOutput
from pipeline.native.library import Library


@dataclass(frozen=True)
class PaiNNOptions:
    """Hyperparameters under the names that released checkpoints use; cutoff in Å.

    ``max_neighbors`` is None if an atom sees all neighbours within the cutoff. With
    ``smooth``, the bias of the filters fades out towards the cutoff as the basis does;
    without it, as in the original, neighbours at the cutoff send a message.

    ``scale_factors`` of the layers, in order, are what a fresh model begins with;
    layers beyond them have 1. They are state, and in no file's hyperparameters.
    """

    hidden_channels: int = 512
    num_layers: int = 6
    num_rbf: int = 128
    cutoff: float = 12.0
    max_neighbors: int | None = 50
    rbf: dict[str, Any] = field(default_factory=lambda: {"name": "gaussian"})
    envelope: dict[str, Any] = field(
        default_factory=lambda: {"name": "polynomial", "exponent": 5}
    )
    regress_forces: bool = True
    direct_forces: bool = True
    use_pbc: bool = True
    num_elements: int = 83
    smooth: bool = False
    scale_factors: list[float] = field(default_factory=list)


class PaiNN(Network):
    """Equivariant message passing with scalar and vector states (arXiv:2102.03150).

    Computes what the released OCP checkpoints compute, which deviates from the paper:
    Gaussian basis, layer norm, scaled SiLU, 1/sqrt(2) residuals, stored scale factors,
    direct forces from gated equivariant blocks. One deviation from the released code:
    with ``direct_forces=False`` forces are ``-dE/dx``; the released code takes the
    gradient of the sum of all node features instead.

    States: ``x`` (N, H) and ``vec`` (N, 3, H); directions point from target to source.
    """

    def __init__(self, **hyperparameters: Any) -> None:
        super().__init__()
        options = PaiNNOptions(**hyperparameters)
        if options.rbf.get("name") != "gaussian":
            raise SpecError(f"Basis {options.rbf} is not supported; use gaussian.")
        if options.hidden_channels < 2:
            raise SpecError(
                f"painn.hidden_channels is {options.hidden_channels}, but at least 2 "
                "are needed, since the last layers have half of them."
            )
        self.options = options
        self.hyperparameters = asdict(options)
        del self.hyperparameters["scale_factors"]
        self.graph_rule = NeighborSpec(
            options.cutoff,
            options.max_neighbors,
            symmetric=True,
            periodic=options.use_pbc,
        )
        width = options.hidden_channels
        self.widths = {"node_features": width, "vector_features": width}
        self.elements = range(1, options.num_elements + 1)
        steps = range(1, options.num_layers + 1)
        self.layers = tuple(f"{kind}{k}" for k in steps for kind in "mu")
        self._build(width)
        reset_linear(self)

    def _build(self, width: int) -> None:
        """Create the layers; their names and order are those of checkpoints."""
        options = self.options
        self.atom_emb = AtomEmbedding(options.num_elements, width)
        self.radial_basis = RadialBasis(
            options.num_rbf, options.cutoff, envelope_exponent(options.envelope)
        )
        layers = range(options.num_layers)
        self.message_layers = nn.ModuleList(
            PaiNNMessage(width, options.num_rbf) for _ in layers
        )
        self.update_layers = nn.ModuleList(PaiNNUpdate(width) for _ in layers)
        given = itertools.chain(options.scale_factors, itertools.repeat(1.0))
        for i, factor in zip(layers, given, strict=False):
            self.add_module(f"upd_out_scalar_scale_{i}", ScaleFactor(factor))
        self.out_energy = nn.Sequential(
            nn.Linear(width, width // 2), ScaledSiLU(), nn.Linear(width // 2, 1)
        )
        if options.regress_forces and options.direct_forces:
            self.out_forces = PaiNNForces(width)

    def forward(
        self, batch: Data, layers: Mapping[str, str] | None = None
    ) -> ModelOutput:
        """Predictions and the states after the last update, in network units.

        ``layers`` takes scalar or vector states from another layer: ``m<k>`` after
        message layer k, ``u<k>`` after update layer k, counted from 1.
        """
        regress = self.options.regress_forces
        if regress and not self.options.direct_forces:
            return differentiate(self, batch, layers or {})
        output, x, vec = self._predict(batch, layers or {})
        if regress:
            with full_precision(x):
                output = replace(output, forces=self.out_forces(x, vec))
        return output if torch.is_grad_enabled() else output.detached()

    def predict_energies(
        self, batch: Data, layers: Mapping[str, str] | None = None
    ) -> ModelOutput:
        """Outputs without forces, differentiable by ``positions`` and ``cell``."""
        return self._predict(batch, layers or {})[0]

    def _predict(
        self, batch: Data, layers: Mapping[str, str]
    ) -> tuple[ModelOutput, Tensor, Tensor]:
        """Outputs without forces, final scalar and vector states."""
        states: dict[str, tuple[Tensor, Tensor]] = {}
        energy, per_atom, x, vec = self._energy(batch, batch.positions, states)
        output = ModelOutput(energy, None, per_atom, x, vec)
        return _with_layers(output, states, layers), x, vec

    def node_states(self, batch: Data) -> dict[str, Tensor]:
        """Scalar states (N, H) after all layers, without forces."""
        states: dict[str, tuple[Tensor, Tensor]] = {}
        self._energy(batch, batch.positions, states)
        return {layer: x for layer, (x, _) in states.items()}

    def _energy(
        self,
        batch: Data,
        positions: Tensor,
        states: dict[str, tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:
        """Energies (B,) and per atom (N,), final scalar and vector states.

        Notes the states of all layers in ``states``.
        """
        smooth = self.options.smooth
        edges = fused_edges(batch, positions, self.radial_basis, smooth=smooth)
        edges = self._edges(batch, positions) if edges is None else edges
        x = self.atom_emb(batch.atomic_numbers)
        library = fused_library(x, edges)
        vec: Tensor | None = None
        for i, (message, update) in enumerate(
            zip(self.message_layers, self.update_layers, strict=True)
        ):
            x, vec = message(x, vec, edges, library)
            states[f"m{i + 1}"] = x, vec
            x, vec = update(x, vec, library)
            x = self.get_submodule(f"upd_out_scalar_scale_{i}")(x)
            states[f"u{i + 1}"] = x, vec
        assert vec is not None  # there is at least one layer
        with full_precision(x):
            per_atom = self.out_energy(x).squeeze(1)
        energy = scatter(per_atom, batch.batch, dim=0, dim_size=batch.num_graphs)
        return energy, per_atom, x, vec

    def _edges(self, batch: Data, positions: Tensor) -> EdgeTensors:
        """Pairs of edges with their radial basis and directions."""
        pairs = Pairs.of(batch)
        edge_vec = edge_vectors(batch, positions)[pairs.edge]  # (P, 3)
        edge_dist = vector_norm(edge_vec)
        rbf = self.radial_basis(edge_dist)  # (P, K)
        smooth = self.options.smooth
        last = self.radial_basis.envelope(edge_dist) if smooth else rbf.new_ones(1)
        return EdgeTensors(
            pairs,
            basis=torch.cat((rbf, last[:, None].expand_as(rbf[:, :1])), dim=1),
            direction=edge_vec / edge_dist[:, None],
            smooth=smooth,
        )


def _with_layers(
    output: ModelOutput,
    states: Mapping[str, tuple[Tensor, Tensor]],
    layers: Mapping[str, str],
) -> ModelOutput:
    """``output`` with the fields in ``layers`` taken from the layers named there."""
    changes = {
        field: states[layer][field == "vector_features"]
        for field, layer in layers.items()
    }
    return replace(output, **changes)


class PaiNNMessage(nn.Module):
    """Adds the filtered states of the neighbours to scalars and vectors."""

    def __init__(self, width: int, num_rbf: int) -> None:
        super().__init__()
        self.x_proj = nn.Sequential(
            nn.Linear(width, width), ScaledSiLU(), nn.Linear(width, 3 * width)
        )
        self.rbf_proj = nn.Linear(num_rbf, 3 * width)
        self.x_layernorm = nn.LayerNorm(width)

    def forward(
        self,
        x: Tensor,
        vec: Tensor | None,
        edges: EdgeTensors,
        library: Library | None = None,
    ) -> tuple[Tensor, Tensor]:
        """New states of all atoms; ``vec`` is None while all vectors are zero."""
        if library is not None:
            norm, (first, _, second) = self.x_layernorm, self.x_proj
            weights = _weights(norm, first, second, self.rbf_proj)
            return FusedMessage.apply(library, edges, norm.eps, x, vec, *weights)
        hidden = self.x_proj[1](self.x_proj[0](self.x_layernorm(x)))
        out_weight, out_bias = self.x_proj[2].parameters()
        filters = self.rbf_proj
        # While all vectors are zero, so is all that the middle third would multiply.
        middle = 0.0 if vec is None else 1.0
        unscaled = (1.0, middle, 1.0)
        width = x.shape[1]
        scaled = (1.0, middle / math.sqrt(3 * width), 1 / math.sqrt(width))
        y = linear(hidden, _thirds(out_weight, unscaled), _thirds(out_bias, unscaled))
        weight = torch.cat((filters.weight, filters.bias[:, None]), dim=1)
        dx, dvec = sum_messages(y, vec, _thirds(weight, scaled), edges)
        return (x + dx) * (1 / math.sqrt(2)), dvec if vec is None else vec + dvec


def _weights(*layers: nn.Module) -> list[Tensor]:
    """Weight and bias, if any, of one layer after the other."""
    both = (w for layer in layers for w in (layer.weight, layer.bias))
    return [cast(Tensor, weight) for weight in both if weight is not None]


def _thirds(rows: Tensor, factors: tuple[float, float, float]) -> Tensor:
    """Multiply each third of the 3H rows by its factor and leave out those of zero."""
    if factors == (1.0, 1.0, 1.0):
        return rows
    thirds = zip(rows.chunk(3), factors, strict=True)
    return torch.cat([third * factor for third, factor in thirds if factor])


class PaiNNUpdate(nn.Module):
    """Mixes scalars and vectors of each atom."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vec_proj = nn.Linear(width, 2 * width, bias=False)
        self.xvec_proj = nn.Sequential(
            nn.Linear(2 * width, width), ScaledSiLU(), nn.Linear(width, 3 * width)
        )

    def forward(
        self, x: Tensor, vec: Tensor, library: Library | None = None
    ) -> tuple[Tensor, Tensor]:
        """New states of all atoms; the scale factor comes after."""
        if library is not None:
            first, _, second = self.xvec_proj
            weights = _weights(self.vec_proj, first, second)
            return FusedUpdate.apply(library, x, vec, *weights)
        width = x.shape[1]
        v1, v2 = self.vec_proj(vec).split(width, dim=2)  # (N, 3, H)
        dot = (v1 * v2).sum(dim=1) * (1 / math.sqrt(width))  # (N, H)
        norm = torch.sqrt(v2.square().sum(dim=1) + 1e-8)
        p, q, r = self.xvec_proj(torch.cat((x, norm), dim=1)).split(width, dim=1)
        return x + (p + q * dot) * (1 / math.sqrt(2)), vec + r[:, None] * v1


class PaiNNForces(nn.Module):
    """Two gated equivariant blocks that turn the final states into forces (N, 3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.output_network = nn.ModuleList(
            (
                GatedEquivariantBlock(width, width // 2),
                GatedEquivariantBlock(width // 2, 1),
            )
        )

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """Forces (N, 3) in network units."""
        for block in self.output_network:
            x, vec = block(x, vec)
        return vec.squeeze(2)


class GatedEquivariantBlock(nn.Module):
    """Maps (N, I), (N, 3, I) to (N, O), (N, 3, O); the gate is not activated."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.out_width = out_width
        self.vec1_proj = nn.Linear(width, width, bias=False)
        self.vec2_proj = nn.Linear(width, out_width, bias=False)
        self.update_net = nn.Sequential(
            nn.Linear(2 * width, width), ScaledSiLU(), nn.Linear(width, 2 * out_width)
        )
        self.activation = ScaledSiLU()

    def forward(self, x: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        """Scalars (N, O) and vectors (N, 3, O)."""
        norm = vector_norm(self.vec1_proj(vec))  # (N, I)
        x, gate = self.update_net(torch.cat((x, norm), dim=1)).split(
            self.out_width, dim=1
        )
        return self.activation(x), gate[:, None] * self.vec2_proj(vec)
