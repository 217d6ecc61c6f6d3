"""GemNet-OC: embeddings, interaction blocks, outputs, features."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch_geometric.data import Data
from torch_geometric.utils import scatter

from pipeline.graphs.neighbors import Edges
from pipeline.models.derivatives import differentiate
from pipeline.models.gemnet.blocks import (
    Bases,
    EdgeEmbedding,
    InteractionBlock,
    OutputBlock,
)
from pipeline.models.gemnet.fitting import fit_scale_factors
from pipeline.models.gemnet.geometry import EdgeGeometry, edge_geometry
from pipeline.models.gemnet.layers import (
    Dense,
    activate,
    divide_sum,
    residuals,
    split_linear,
    through,
)
from pipeline.models.gemnet.memory import estimate_memory
from pipeline.models.gemnet.options import GemNetOCOptions
from pipeline.models.gemnet.shared import SharedBases
from pipeline.models.gemnet.slots import Slots
from pipeline.models.gemnet.tables import Tables, make_tables
from pipeline.models.layers import AtomEmbedding
from pipeline.models.output import ModelOutput

States = tuple[Tensor, Tensor | None]
_FINAL = "concatmlp"
_EDGE_FIELDS = ("edge_features", "edge_to_node_features", "vector_features")


class GemNetOC(SharedBases):
    """Message passing between atoms and directed edges (arXiv:2204.02782).

    States: ``h`` (N, emb_size_atom) and ``m`` (E, emb_size_edge). Layers that features
    may be taken from: ``concatmlp`` (the global output MLPs, the default), ``X_k`` (the
    k-th output block) and ``regular_k`` (h and m after block k); 0 is before the first
    block. Without direct forces only ``regular_k`` has edge features.
    """

    is_fitted = False

    def __init__(self, **hyperparameters: Any) -> None:
        super().__init__()
        options = GemNetOCOptions(**hyperparameters)
        options.check()
        self.options = options
        self.hyperparameters = asdict(options)
        self.graph_rule = options.graph_rule
        self.elements = range(1, options.num_elements + 1)
        self.direct = options.direct_forces
        self.widths = {"node_features": options.emb_size_atom}
        if self.direct:
            self.widths |= dict.fromkeys(_EDGE_FIELDS, options.emb_size_edge)
        steps = range(options.num_blocks + 1)
        self.layers = (
            _FINAL,
            *(f"X_{k}" for k in steps),
            *(f"regular_{k}" for k in steps),
        )
        self.build_bases()
        self._build_blocks()

    def layer_width(self, field: str, layer: str) -> int | None:
        """Width of ``field`` at one of ``layers``; None where it does not exist."""
        if layer not in self.layers:
            return None
        if field == "node_features":
            return self.options.emb_size_atom
        has_edges = self.direct or layer.startswith("regular_")
        offered = has_edges and field in _EDGE_FIELDS
        return self.options.emb_size_edge if offered else None

    def estimate_memory(self, edges: Edges, n_atoms: int) -> int:
        """Bytes that one structure adds to the peak of a pass without gradients."""
        return estimate_memory(self.options, edges, n_atoms)

    def fit(self, batch: Data) -> None:
        """Set the scale factors so that no layer changes the variance on ``batch``."""
        fit_scale_factors(self, batch)

    def _build_blocks(self) -> None:
        """Create embeddings, blocks and heads under the names of checkpoints."""
        o = self.options
        atom, edge, count = o.emb_size_atom, o.emb_size_edge, o.num_blocks
        self.atom_emb = AtomEmbedding(o.num_elements, atom)
        self.edge_emb = EdgeEmbedding(atom, o.num_radial, edge)
        self.int_blocks = nn.ModuleList(InteractionBlock(o) for _ in range(count))
        self.out_blocks = nn.ModuleList(OutputBlock(o) for _ in range(count + 1))
        self.out_mlp_E = self._global_mlp(atom)
        self.out_energy = Dense(atom, 1, activated=False)
        if self.direct:
            self.out_mlp_F = self._global_mlp(edge)
            self.out_forces = Dense(edge, 1, activated=False)

    def _global_mlp(self, width: int) -> nn.ModuleList:
        o = self.options
        layers = residuals(o.num_global_out_layers, width)
        layers.insert(0, Dense((o.num_blocks + 1) * width, width, activated=True))
        return layers

    def forward(
        self, batch: Data, layers: Mapping[str, str] | None = None
    ) -> ModelOutput:
        """Outputs in network units; ``layers`` names the layer of some features."""
        regress = self.options.regress_forces
        if regress and not self.direct:
            return differentiate(self, batch, layers or {})
        return self._predict(batch, layers or {}, with_forces=regress)

    def predict_energies(
        self, batch: Data, layers: Mapping[str, str] | None = None
    ) -> ModelOutput:
        """Outputs without forces, differentiable by ``positions`` and ``cell``."""
        return self._predict(batch, layers or {}, with_forces=False)

    def _predict(
        self,
        batch: Data,
        layers: Mapping[str, str],
        *,
        with_forces: bool,
    ) -> ModelOutput:
        """Outputs with forces of the head, if they are wanted."""
        tables, positions = make_tables(batch, self.options), batch.positions
        geometry = edge_geometry(batch, positions)
        wanted = set(layers.values())
        states = self._states(batch, positions, tables, geometry, wanted)
        node, edge = states[_FINAL]
        per_atom = _in_weights_precision(self.out_energy, node).squeeze(1)
        reduce = "sum" if self.options.extensive else "mean"
        energy = scatter(
            per_atom, batch.batch, dim=0, dim_size=batch.num_graphs, reduce=reduce
        )
        forces = None
        if with_forces and edge is not None:
            forces = self._forces(edge, geometry, tables)
        output = ModelOutput(energy, forces, per_atom, node, None)
        return _with_features(output, states, layers, geometry, tables.main.slots)

    def node_states(self, batch: Data) -> dict[str, Tensor]:
        """Atom states (N, C): of blocks, of output blocks, at the end; no forces."""
        tables = make_tables(batch, self.options)
        geometry = edge_geometry(batch, batch.positions)
        states = self._states(
            batch, batch.positions, tables, geometry, set(self.layers)
        )
        order = [layer for layer in self.layers if layer.startswith("regular_")]
        order += [layer for layer in self.layers if layer.startswith("X_")]
        return {layer: states[layer][0] for layer in (*order, _FINAL)}

    def _states(
        self,
        batch: Data,
        positions: Tensor,
        tables: Tables,
        geometry: EdgeGeometry,
        wanted: set[str],
    ) -> dict[str, States]:
        """Atom and edge states at the final and all ``wanted`` layers."""
        radial = self.radial_basis(geometry.distance)  # (E, R)
        bases = self.make_bases(batch, positions, tables, geometry, radial)
        return self._run(batch.atomic_numbers, radial, bases, wanted)

    def _run(
        self, atomic_numbers: Tensor, radial: Tensor, bases: Bases, wanted: set[str]
    ) -> dict[str, States]:
        """Atom and edge states at the final and all ``wanted`` layers."""
        main = bases.tables.main
        h = self.atom_emb(atomic_numbers)
        m = self.edge_emb(h, radial, main.source, main.target)
        states: dict[str, States] = {"regular_0": (h, m)}
        outputs = []
        for k, out_block in enumerate(self.out_blocks):
            if k > 0:
                h, m = self.int_blocks[k - 1](h, m, bases)
            outputs.append(out_block(h, m, bases))
            states |= {f"regular_{k}": (h, m), f"X_{k}": outputs[-1]}
        kept = {name: states[name] for name in wanted - {_FINAL}}
        node = _global_state(self.out_mlp_E, [x for x, _ in outputs])
        edges = [x for _, x in outputs if x is not None]
        edge = _global_state(self.out_mlp_F, edges) if self.direct else None
        return {**kept, _FINAL: (node, edge)}

    def _forces(self, edge: Tensor, geometry: EdgeGeometry, tables: Tables) -> Tensor:
        """Forces (N, 3) of final edge states (E, E)."""
        size = _in_weights_precision(self.out_forces, edge)  # (E, 1)
        if self.options.forces_coupled:
            size = (size + size.index_select(0, tables.swap)) / 2
        slots = tables.main.slots
        return scatter(size * geometry.unit, slots.target, dim=0, dim_size=slots.count)


def _global_state(layers: nn.ModuleList, parts: list[Tensor]) -> Tensor:
    """Result of a global output MLP for the outputs of all blocks."""
    first, *rest = layers
    assert isinstance(first, Dense)
    head, *others = split_linear(first.linear.weight, *parts)
    return through(rest, activate(divide_sum(head, others, 1.0)))


def _in_weights_precision(head: Dense, x: Tensor) -> Tensor:
    """The last layer, kept out of reduced precision: its sums are the result."""
    weight = head.linear.weight
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.to(weight.dtype), weight)


def _with_features(
    output: ModelOutput,
    states: Mapping[str, States],
    layers: Mapping[str, str],
    geometry: EdgeGeometry,
    slots: Slots,
) -> ModelOutput:
    """``output`` with the features of all fields from their layers."""
    node, _ = states[layers.get("node_features", _FINAL)]
    features: dict[str, Tensor] = {"node_features": node}
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for field in _EDGE_FIELDS:
        layer = layers.get(field, _FINAL)
        edge = states[layer][1]
        if edge is None:
            continue
        if field == "edge_features":
            features[field] = edge
            continue
        if layer not in sums:
            sums[layer] = _edge_sums(edge, geometry, slots)
        features[field] = sums[layer][field == "vector_features"]
    return replace(output, **features)


def _edge_sums(
    edge: Tensor, geometry: EdgeGeometry, slots: Slots
) -> tuple[Tensor, Tensor]:
    """Plain sums (N, C) and sums (N, 3, C) with unit vectors, of edge states (E, C).

    The unit vectors are those of the paper, from the target to the source.
    """
    with torch.autocast(edge.device.type, enabled=False):
        edge = edge.to(geometry.unit.dtype)
        ones = torch.ones_like(geometry.unit[:, :1])
        weights = slots.pad(torch.cat((ones, -geometry.unit), dim=1))  # (N, slots, 4)
        sums = torch.bmm(weights.transpose(1, 2), slots.pad(edge))  # (N, 4, C)
    return sums[:, 0], sums[:, 1:]
