"""Message passing over paths d -> b -> a <- c with two angles and a dihedral."""

import torch
from torch import Tensor

from pipeline.models.gemnet.geometry import QuadAngles
from pipeline.models.gemnet.interactions import Bilinear, BothDirections, angular_sum
from pipeline.models.gemnet.layers import Dense, Scale
from pipeline.models.gemnet.tables import QuadTables


class QuadMessages(BothDirections):
    """Edge states of (d -> b) to edges (c -> a) through middle edges (b -> a).

    The outer basis is a product of functions of the angle at a and of the dihedral, so
    the sum runs over d first and over b afterwards.
    """

    def __init__(
        self,
        width: int,
        rbf: int,
        cbf: int,
        sbf: int,
        narrow_in: int,
        narrow_out: int,
    ) -> None:
        super().__init__()
        self.dense_db = Dense(width, width, activated=True)
        self.mlp_rbf = Dense(rbf, width, activated=False)
        self.scale_rbf = Scale()
        self.mlp_cbf = Dense(cbf, narrow_in, activated=False)
        self.scale_cbf = Scale()
        self.mlp_sbf = Bilinear(sbf * narrow_in, narrow_out)
        self.scale_sbf_sum = Scale()
        self.down_projection = Dense(width, narrow_in, activated=True)
        self.up_projection_ca = Dense(narrow_out, width, activated=True)
        self.up_projection_ac = Dense(narrow_out, width, activated=True)

    def forward(
        self,
        m: Tensor,
        radial: Tensor,
        matrices: Tensor,
        inner_basis: Tensor,
        angles: QuadAngles,
        tables: QuadTables,
        swap: Tensor,
    ) -> Tensor:
        """Messages (E, width) of edge states ``m`` (E, width).

        ``radial`` (I, rbf) of the input edges, ``matrices`` (O, sbf, S²) of the output
        edges, ``inner_basis`` (Q, in slots, cbf) of the angles at b.
        """
        x = self.dense_db(m.index_select(0, tables.in_edges))
        narrow = self.down_projection(self.scale_rbf(x * self.mlp_rbf(radial), x))
        entering = tables.in_slots.pad(narrow).index_select(0, tables.in_row)
        entering = self.scale_cbf(self.mlp_cbf(inner_basis) * entering, entering)
        sums = _over_middle_edges(
            angular_sum(angles.dihedral, entering), angles, tables
        )
        y = self.mlp_sbf(torch.bmm(matrices.to(sums.dtype), sums))
        y = self.scale_sbf_sum(y, x)
        # Edges without quadruplets get zero, there being no biases.
        everywhere = y.new_zeros(len(m), y.shape[1])
        return self.spread(everywhere.index_copy(0, tables.out_edges, y), swap)


def _over_middle_edges(parts: Tensor, angles: QuadAngles, tables: QuadTables) -> Tensor:
    """Sums (O, S * S, T) of ``parts`` (Q, out slots, S, T) over the middle edges.

    The first S counts functions of the angle at a, the second of the dihedral.
    """
    _, slots, degree, width = parts.shape
    middle = tables.middle
    # (A, middle slots, out slots, S * T) -> (A * out slots, middle slots, S * T)
    grouped = middle.pad(parts.flatten(2)).transpose(1, 2).flatten(0, 1)
    outer = middle.pad(angles.out).permute(0, 2, 3, 1).flatten(0, 1)
    sums = torch.bmm(outer.to(grouped.dtype), grouped)  # (A * out slots, S, S * T)
    sums = sums.view(middle.count, slots, degree * degree, width)
    return tables.out_slots.pick(sums)
