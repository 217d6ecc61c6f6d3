"""The order of interactions and residual layers in one block, and output blocks."""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from pipeline.models.gemnet.geometry import QuadAngles
from pipeline.models.gemnet.interactions import (
    AngularMessages,
    PairMessages,
    angular_sum,
)
from pipeline.models.gemnet.layers import (
    Dense,
    Scale,
    activate,
    average,
    divide_sum,
    residuals,
    split_linear,
    through,
)
from pipeline.models.gemnet.options import GemNetOCOptions
from pipeline.models.gemnet.quadruplets import QuadMessages
from pipeline.models.gemnet.slots import Slots
from pipeline.models.gemnet.tables import Tables


@dataclass(frozen=True)
class AngleBasis:
    """Input of one kind of angular messages, made once for all blocks.

    ``radial`` of the input edges, ``matrices`` of the output edges, ``functions``
    (N, output slots, S, input slots) of the angles.
    """

    radial: Tensor
    matrices: Tensor
    functions: Tensor


@dataclass(frozen=True)
class QuadBasis:
    """Input of the quadruplet messages, see :class:`QuadMessages`."""

    radial: Tensor
    matrices: Tensor
    inner: Tensor
    angles: QuadAngles


@dataclass(frozen=True)
class PairBasis:
    """Input of the pair messages, see :class:`PairMessages`."""

    weights: Tensor
    source: Tensor
    slots: Slots


@dataclass(frozen=True)
class Bases:
    """Everything that all blocks share; None where an interaction is off."""

    tables: Tables
    edge_edge: AngleBasis
    atom_edge: AngleBasis | None
    edge_atom: AngleBasis | None
    quad: QuadBasis | None
    pair: PairBasis | None
    update: Tensor
    output: Tensor


class EdgesToAtoms(nn.Module):
    """Sums edge states on their target atoms and passes them through layers."""

    def __init__(self, options: GemNetOCOptions) -> None:
        super().__init__()
        edge, atom = options.emb_size_edge, options.emb_size_atom
        self.dense_rbf = Dense(options.emb_size_rbf, edge, activated=False)
        self.scale_sum = Scale()
        self.layers = residuals(options.num_atom, atom)
        if edge != atom:
            self.layers.insert(0, Dense(edge, atom, activated=True))

    def gather(self, m: Tensor, radial: Tensor, target: Tensor, count: int) -> Tensor:
        """Atom values (N, A) of edge states ``m`` (E, E) and ``radial`` (E, rbf)."""
        weighted = m * self.dense_rbf(radial)
        total = weighted.new_zeros(count, weighted.shape[1])
        total = total.index_add(0, target, weighted)
        return through(self.layers, self.scale_sum(total, m))


class AtomUpdate(EdgesToAtoms):
    """The part of an interaction block that turns edge states into atom states."""

    def forward(self, m: Tensor, bases: Bases) -> Tensor:
        """Atom values (N, A) of edge states ``m`` (E, E)."""
        main = bases.tables.main
        return self.gather(m, bases.update, main.target, main.slots.count)


class OutputBlock(EdgesToAtoms):
    """Contribution of one block to the outputs on atoms and, if direct, on edges."""

    def __init__(self, options: GemNetOCOptions) -> None:
        super().__init__(options)
        edge = options.emb_size_edge
        self.seq_energy2 = residuals(
            options.num_output_afteratom, options.emb_size_atom
        )
        self.direct = options.direct_forces
        if self.direct:
            self.dense_rbf_F = Dense(options.emb_size_rbf, edge, activated=False)
            self.scale_rbf_F = Scale()
            self.seq_forces = residuals(options.num_atom, edge)

    def forward(
        self, h: Tensor, m: Tensor, bases: Bases
    ) -> tuple[Tensor, Tensor | None]:
        """Values on atoms (N, A) and on edges (E, E) of the states ``h`` and ``m``."""
        main = bases.tables.main
        atoms = self.gather(m, bases.output, main.target, main.slots.count)
        if len(self.seq_energy2):
            atoms = through(self.seq_energy2, average(h, atoms))
        if not self.direct:
            return atoms, None
        edges = through(self.seq_forces, m)
        return atoms, self.scale_rbf_F(edges * self.dense_rbf_F(bases.output), edges)


class EdgeEmbedding(nn.Module):
    """Edge states from the states of both atoms and one vector per edge."""

    def __init__(self, atom: int, own: int, width: int) -> None:
        super().__init__()
        self.dense = Dense(2 * atom + own, width, activated=True)

    def forward(self, h: Tensor, own: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """``act(W [h_source, h_target, own])``, (E, width)."""
        weight = self.dense.linear.weight
        # Atoms are fewer than edges, so the layer is applied before copying them.
        of_source, of_target, of_own = split_linear(weight, h, h, own)
        parts = (of_source.index_select(0, source), of_target.index_select(0, target))
        return activate(divide_sum(of_own, parts, 1.0))


class InteractionBlock(nn.Module):
    """One round of all interactions; maps (h, m) to new (h, m)."""

    def __init__(self, options: GemNetOCOptions) -> None:
        super().__init__()
        self.options = options
        edge, atom = options.emb_size_edge, options.emb_size_atom
        sizes = (
            options.emb_size_rbf,
            options.emb_size_cbf,
            options.emb_size_trip_in,
            options.emb_size_trip_out,
        )
        self.dense_ca = Dense(edge, edge, activated=True)
        self.trip_interaction = AngularMessages(edge, edge, sizes, both_directions=True)
        if options.quad_interaction:
            self.quad_interaction = QuadMessages(
                edge,
                options.emb_size_rbf,
                options.emb_size_cbf,
                options.emb_size_sbf,
                options.emb_size_quad_in,
                options.emb_size_quad_out,
            )
        if options.atom_edge_interaction:
            self.atom_edge_interaction = AngularMessages(
                atom, edge, sizes, both_directions=True
            )
        if options.edge_atom_interaction:
            self.edge_atom_interaction = AngularMessages(
                edge, atom, sizes, both_directions=False
            )
        if options.atom_interaction:
            self.atom_interaction = PairMessages(
                atom,
                options.emb_size_rbf,
                options.emb_size_aint_in,
                options.emb_size_aint_out,
            )
        self.layers_before_skip = residuals(options.num_before_skip, edge)
        self.layers_after_skip = residuals(options.num_after_skip, edge)
        self.atom_emb_layers = residuals(options.num_atom_emb_layers, atom)
        self.atom_update = AtomUpdate(options)
        self.concat_layer = EdgeEmbedding(atom, edge, edge)
        self.residual_m = residuals(options.num_concat, edge)

    def forward(self, h: Tensor, m: Tensor, bases: Bases) -> tuple[Tensor, Tensor]:
        """New atom states (N, A) and edge states (E, E)."""
        main = bases.tables.main
        edges = self._edge_messages(h, m, bases)
        atoms = self._atom_messages(h, m, bases)
        edges = through(self.layers_before_skip, edges)
        m = through(self.layers_after_skip, average(m, edges))
        atoms = through(self.atom_emb_layers, atoms)
        h = average(atoms, self.atom_update(m, bases))
        fresh = self.concat_layer(h, m, main.source, main.target)
        return h, average(m, through(self.residual_m, fresh))

    def _edge_messages(self, h: Tensor, m: Tensor, bases: Bases) -> Tensor:
        """Sum of all messages into edges, scaled to the variance of one."""
        tables, basis = bases.tables, bases.edge_edge
        layer = self.trip_interaction
        messages = layer.messages(m, basis.radial)
        parts = [self._to_edges(layer, messages, tables.main.slots, basis, tables)]
        if self.options.quad_interaction and bases.quad is not None:
            assert tables.quads is not None
            quad = bases.quad
            parts.append(
                self.quad_interaction(
                    m,
                    quad.radial,
                    quad.matrices,
                    quad.inner,
                    quad.angles,
                    tables.quads,
                    tables.swap,
                )
            )
        if bases.atom_edge is not None:
            layer, basis, ae = self.atom_edge_interaction, bases.atom_edge, tables.ae
            assert ae is not None
            messages = layer.messages(h, basis.radial, ae.source)
            parts.append(self._to_edges(layer, messages, ae.slots, basis, tables))
        # An interaction without any path counts although it adds nothing.
        kinds = 2 + self.options.quad_interaction + self.options.atom_edge_interaction
        return divide_sum(self.dense_ca(m), parts, math.sqrt(kinds))

    def _to_edges(
        self,
        layer: AngularMessages,
        messages: tuple[Tensor, Tensor],
        slots: Slots,
        basis: AngleBasis,
        tables: Tables,
    ) -> Tensor:
        """Main edges' sums of ``messages`` from edges in ``slots``, both directions."""
        narrow, wide = messages
        table = angular_sum(basis.functions, slots.pad(narrow))
        sums = tables.main.slots.pick(table)
        return layer.spread(layer.combine(basis.matrices, sums, wide), tables.swap)

    def _atom_messages(self, h: Tensor, m: Tensor, bases: Bases) -> Tensor:
        """Atom states with all messages into atoms, scaled to the variance of one."""
        parts = []
        if bases.edge_atom is not None:
            parts.append(self._edge_to_atom(m, bases.edge_atom, bases.tables))
        if bases.pair is not None:
            pair = bases.pair
            parts.append(
                self.atom_interaction(h, pair.weights, pair.source, pair.slots)
            )
        # A copy, because what is added to is overwritten.
        return divide_sum(h.clone(), parts, math.sqrt(1 + len(parts)))

    def _edge_to_atom(self, m: Tensor, basis: AngleBasis, tables: Tables) -> Tensor:
        layer = self.edge_atom_interaction
        narrow, wide = layer.messages(m, basis.radial)
        sums = angular_sum(basis.functions, tables.main.slots.pad(narrow))
        # The bilinear layer is linear: all edges of an atom are summed before it.
        y = layer.combine(basis.matrices, sums.flatten(1, 2), wide)
        return layer.up_projection_ca(y)
