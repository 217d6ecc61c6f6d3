"""Bases that all blocks share: their parameters, and their values for a batch."""

from functools import partial

from torch import Tensor, nn
from torch_geometric.data import Data

from pipeline.models.gemnet.bases import (
    CosineBasis,
    RadialAngularProjection,
    radial_projection,
    sum_over_images,
)
from pipeline.models.gemnet.blocks import AngleBasis, Bases, PairBasis, QuadBasis
from pipeline.models.gemnet.geometry import (
    EdgeGeometry,
    edge_geometry,
    pair_angles,
    quad_angles,
)
from pipeline.models.gemnet.layers import Dense, he_orthogonal_
from pipeline.models.gemnet.options import GemNetOCOptions
from pipeline.models.gemnet.slots import Slots
from pipeline.models.gemnet.tables import Tables
from pipeline.models.layers import RadialBasis, envelope_exponent
from pipeline.models.network import Network

_radial = partial(RadialBasis, exact_width=True)


class SharedBases(Network):
    """The part of GemNet-OC below its blocks; entries are named as in checkpoints."""

    options: GemNetOCOptions
    mlp_rbf_qint: Dense
    mlp_rbf_aeint: Dense
    mlp_rbf_eaint: Dense
    mlp_rbf_tint: Dense
    mlp_cbf_qint: RadialAngularProjection
    mlp_cbf_aeint: RadialAngularProjection
    mlp_cbf_eaint: RadialAngularProjection
    mlp_cbf_tint: RadialAngularProjection

    def build_bases(self) -> None:
        """Create bases and projections in the order of checkpoints."""
        o = self.options
        radial, spherical = o.num_radial, o.num_spherical
        exponent = envelope_exponent(o.envelope)
        self.radial_basis = _radial(radial, o.cutoff, exponent)
        if o.quad_interaction:
            self.cbf_basis_qint = CosineBasis(radial, o.quad_graph[0], exponent)
        if o.atom_edge_interaction or o.edge_atom_interaction:
            cutoff = o.atom_edge_graph[0]
            self.radial_basis_aeaint = _radial(radial, cutoff, exponent)
        if o.atom_interaction:
            self.radial_basis_aint = _radial(radial, o.base_graph[0], exponent)
        if o.quad_interaction:
            self._add_projections("qint")
            self.mlp_sbf_qint = RadialAngularProjection(
                radial, spherical**2, o.emb_size_sbf
            )
        if o.atom_edge_interaction:
            self._add_projections("aeint")
        if o.edge_atom_interaction:
            self._add_projections("eaint")
        if o.atom_interaction:
            self.mlp_rbf_aint = nn.Linear(radial, o.emb_size_rbf, bias=False)
            he_orthogonal_(self.mlp_rbf_aint.weight)
        self._add_projections("tint")
        self.mlp_rbf_h = radial_projection(radial, o.emb_size_rbf)
        self.mlp_rbf_out = radial_projection(radial, o.emb_size_rbf)

    def _add_projections(self, name: str) -> None:
        o = self.options
        radial = radial_projection(o.num_radial, o.emb_size_rbf)
        matrices = RadialAngularProjection(
            o.num_radial, o.num_spherical, o.emb_size_cbf
        )
        self.add_module(f"mlp_rbf_{name}", radial)
        self.add_module(f"mlp_cbf_{name}", matrices)

    def make_bases(
        self,
        batch: Data,
        positions: Tensor,
        tables: Tables,
        main: EdgeGeometry,
        radial: Tensor,
    ) -> Bases:
        """Values of all bases; ``radial`` (E, R) is that of the main edges."""
        o = self.options
        units = tables.main.slots.pad(main.unit)
        functions = pair_angles(units, units, tables.edge_edge, o.num_spherical)
        edge_edge = AngleBasis(
            self.mlp_rbf_tint(radial), self.mlp_cbf_tint(radial), functions
        )
        atom_edge = edge_atom = None
        if tables.ae is not None:
            ae = edge_geometry(batch, positions, "ae_")
            atom_edge, edge_atom = self._mixed(tables, ae, units, radial)
        quad = pair = None
        if tables.quads is not None:
            quad = self._quad(batch, positions, tables, main, radial)
        if o.atom_interaction:
            pair = self._pair(batch, positions)
        return Bases(
            tables=tables,
            edge_edge=edge_edge,
            atom_edge=atom_edge,
            edge_atom=edge_atom,
            quad=quad,
            pair=pair,
            update=self.mlp_rbf_h(radial),
            output=self.mlp_rbf_out(radial),
        )

    def _mixed(
        self, tables: Tables, ae: EdgeGeometry, units: Tensor, radial: Tensor
    ) -> tuple[AngleBasis | None, AngleBasis | None]:
        """Bases between main edges and the edges of the atom-edge graph."""
        o = self.options
        assert tables.ae is not None
        assert tables.edge_atom is not None
        slots = tables.ae.slots
        radial_ae = self.radial_basis_aeaint(ae.distance)
        functions = pair_angles(
            units, slots.pad(ae.unit), tables.edge_atom, o.num_spherical
        )  # (N, main slots, S, ae slots)
        atom_edge = edge_atom = None
        if o.atom_edge_interaction:
            atom_edge = AngleBasis(
                self.mlp_rbf_aeint(radial_ae), self.mlp_cbf_aeint(radial), functions
            )
        if o.edge_atom_interaction:
            # All output edges of an atom side by side: (N, c, ae slots * S).
            matrices = slots.pad(self.mlp_cbf_eaint(radial_ae))
            edge_atom = AngleBasis(
                self.mlp_rbf_eaint(radial),
                matrices.transpose(1, 2).flatten(2),
                functions.permute(0, 3, 2, 1).contiguous(),
            )
        return atom_edge, edge_atom

    def _quad(
        self,
        batch: Data,
        positions: Tensor,
        tables: Tables,
        main: EdgeGeometry,
        radial: Tensor,
    ) -> QuadBasis:
        """Bases of quadruplets."""
        quads = tables.quads
        assert quads is not None
        quad = edge_geometry(batch, positions, "quad_")
        angles = quad_angles(main, quad, quads, self.options.num_spherical)
        circular = self.mlp_cbf_qint(self.cbf_basis_qint(quad.distance))  # (Q, c, S)
        return QuadBasis(
            radial=self.mlp_rbf_qint(radial.index_select(0, quads.in_edges)),
            matrices=self.mlp_sbf_qint(radial.index_select(0, quads.out_edges)),
            inner=angles.inside.to(circular.dtype) @ circular.transpose(1, 2),
            angles=angles,
        )

    def _pair(self, batch: Data, positions: Tensor) -> PairBasis:
        """Radial weights of all atom pairs, summed over the images of an atom."""
        source, target = batch.aa_edge_index
        distance = edge_geometry(batch, positions, "aa_").distance
        # Sorted by target and source, so the images of one pair lie side by side.
        fresh = source.new_ones(len(source), dtype=bool)
        fresh[1:] = (source[1:] != source[:-1]) | (target[1:] != target[:-1])
        pair = fresh.cumsum(0) - 1
        source, target = source[fresh], target[fresh]
        slots = Slots.of(target, batch.num_nodes)
        weights = sum_over_images(
            distance, pair, len(source), self.radial_basis_aint, self.mlp_rbf_aint
        )
        return PairBasis(slots.pad(weights).transpose(1, 2), source, slots)
