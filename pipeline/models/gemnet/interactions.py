"""Message passing between edges, atoms and both, through angles and distances."""

import torch
from torch import Tensor, nn

from pipeline.models.gemnet.layers import Dense, Scale, average
from pipeline.models.gemnet.slots import Slots


class Bilinear(nn.Module):
    """Linear map of an outer product, under the name checkpoints use."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.bilinear = Dense(in_width, out_width, activated=False)

    def forward(self, x: Tensor) -> Tensor:
        """Values (..., out_width) of the matrices ``x`` (..., a, b), a * b inputs."""
        return self.bilinear(x.flatten(-2))


class BothDirections(nn.Module):
    """Mixin: spreads a message over an edge and its mirror."""

    up_projection_ca: Dense
    up_projection_ac: Dense

    def spread(self, y: Tensor, swap: Tensor) -> Tensor:
        """Messages (E, width) of edge values (E, narrow)."""
        own = self.up_projection_ca(y)
        # Mirrored while still narrow: moving (E, width) values costs more.
        mirrored = self.up_projection_ac(y.index_select(0, swap))
        return average(mirrored, own)


class AngularMessages(BothDirections):
    """Sums messages of edges or atoms over all angles at the target atom.

    One class for the released ``trip_interaction`` (edge to edge),
    ``atom_edge_interaction`` and ``edge_atom_interaction``; see
    :func:`angular_sum` and the interaction blocks for how they differ.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        sizes: tuple[int, int, int, int],
        *,
        both_directions: bool,
    ) -> None:
        super().__init__()
        rbf, cbf, narrow_in, narrow_out = sizes
        self.dense_ba = Dense(in_width, in_width, activated=True)
        self.mlp_rbf = Dense(rbf, in_width, activated=False)
        self.scale_rbf = Scale()
        self.mlp_cbf = Bilinear(cbf * narrow_in, narrow_out)
        self.scale_cbf_sum = Scale()
        self.down_projection = Dense(in_width, narrow_in, activated=True)
        self.up_projection_ca = Dense(narrow_out, out_width, activated=True)
        if both_directions:
            self.up_projection_ac = Dense(narrow_out, out_width, activated=True)

    def messages(
        self, states: Tensor, radial: Tensor, source: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Narrow messages (F, trip_in) of edges, and what they were made from.

        ``states`` are those of the edges, or of the atoms where ``source`` (F,) names
        the atom of each edge; ``radial`` (F, rbf).
        """
        x = self.dense_ba(states)
        wide = x if source is None else x.index_select(0, source)
        scaled = self.scale_rbf(wide * self.mlp_rbf(radial), wide)
        return self.down_projection(scaled), wide

    def combine(self, matrices: Tensor, sums: Tensor, reference: Tensor) -> Tensor:
        """Values (E, trip_out) of per-edge matrices (E, c, S) and sums (E, S, T)."""
        y = self.mlp_cbf(torch.bmm(matrices.to(sums.dtype), sums))
        return self.scale_cbf_sum(y, reference)


def angular_sum(functions: Tensor, messages: Tensor) -> Tensor:
    """Messages (N, G, T) summed with angular functions (N, D, S, G): (N, D, S, T)."""
    atoms, slots, degree, _ = functions.shape
    flat = torch.bmm(functions.flatten(1, 2).to(messages.dtype), messages)
    return flat.view(atoms, slots, degree, messages.shape[2])


class PairMessages(nn.Module):
    """Sums narrow atom states over all atoms around, weighted by distance."""

    def __init__(self, width: int, rbf: int, narrow_in: int, narrow_out: int) -> None:
        super().__init__()
        self.bilinear = Dense(rbf * narrow_in, narrow_out, activated=False)
        self.scale_rbf_sum = Scale()
        self.down_projection = Dense(width, narrow_in, activated=True)
        self.up_projection = Dense(narrow_out, width, activated=True)

    def forward(
        self, h: Tensor, weights: Tensor, source: Tensor, slots: Slots
    ) -> Tensor:
        """Messages (N, width) of atom states ``h``.

        ``weights`` (N, rbf, slots) of all pairs by slot, ``source`` (P,) atom of each.
        """
        narrow = self.down_projection(h)
        gathered = slots.pad(narrow.index_select(0, source))  # (N, slots, narrow)
        sums = torch.bmm(weights.to(gathered.dtype), gathered).flatten(1)
        return self.up_projection(self.scale_rbf_sum(self.bilinear(sums), h))
