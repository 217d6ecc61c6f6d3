"""Edges arranged by target atom: a dense table that replaces lists of triplets.

All edges into one atom meet each other, so angular sums become batched matrix products
over tables of (atoms, slots, slots) instead of gathers over every triplet.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """Place of every edge in a table with one row per atom.

    ``target`` (E,) row of each edge, ascending; ``count`` rows; ``width`` slots per
    row, the largest number of edges of an atom.
    """

    target: Tensor
    count: int
    width: int
    flat: Tensor

    @classmethod
    def of(cls, target: Tensor, count: int) -> "Slots":
        """Slots of edges sorted by ``target`` (E,) among ``count`` atoms."""
        degree = torch.bincount(target, minlength=count)
        first = degree.cumsum(0) - degree
        position = torch.arange(len(target), device=target.device) - first[target]
        width = int(degree.max()) if len(target) else 0
        return cls(target, count, width, target * width + position)

    def pad(self, values: Tensor) -> Tensor:
        """Table (count, width, ...) of values (E, ...); empty slots are zero."""
        table = values.new_zeros(self.count * self.width, *values.shape[1:])
        return table.index_copy(0, self.flat, values).view(
            self.count, self.width, *values.shape[1:]
        )

    def pick(self, table: Tensor) -> Tensor:
        """Values (E, ...) out of a table (count, width, ...)."""
        return table.flatten(0, 1).index_select(0, self.flat)

    @cached_property
    def filled(self) -> Tensor:
        """Whether a slot holds an edge, (count, width) bool."""
        return self.pad(torch.ones_like(self.target, dtype=torch.bool))


def partners(source: Tensor, target: Tensor, shift: Tensor) -> Tensor:
    """Position (E,) of every edge's mirror in a symmetric graph.

    Edges are sorted by (target, source, shift), and ``shift`` (E,) is a code that is
    odd in the lattice shift.
    """
    # The mirrored edges are the same edges in another order; sorting them like the
    # edges themselves tells which is which. Three stable sorts make one by all keys.
    order = torch.argsort(-shift, stable=True)
    order = order[torch.argsort(target[order], stable=True)]
    order = order[torch.argsort(source[order], stable=True)]
    result = torch.empty_like(order)
    result[order] = torch.arange(len(order), device=order.device)
    return result


def shift_code(offsets: list[Tensor]) -> list[Tensor]:
    """One integer (E,) for each lattice shift (E, 3), alike over all the lists.

    Codes are linear: that of a sum of two shifts is the sum of their codes, and
    different sums of up to three shifts have different codes.
    """
    largest = max(
        (int(shift.abs().max()) for shift in offsets if shift.numel()), default=0
    )
    base = 6 * largest + 1
    whole = [shift.long() for shift in offsets]
    return [(s[:, 0] * base + s[:, 1]) * base + s[:, 2] for s in whole]
