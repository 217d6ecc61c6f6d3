"""Sums of messages over edges, without what their plain formulation wastes.

Filters depend on distances alone, so an edge and its mirror image share theirs. PaiNN's
sum is bound by memory traffic besides: with all edges at once, every temporary has E
times 3H numbers. Blocks of edges keep them in the processor's cache, and the backward
pass computes them again instead of storing them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch_geometric.data import Data

# Bytes of one block's filters: a common second-level cache, or, where launching a
# kernel is what costs, a modest share of a GPU's memory.
_BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 29}
_SMALLEST_BLOCK = 32


@dataclass(frozen=True)
class Pairs:
    """Edges of a graph, an edge and its mirror image together.

    ``edge`` (P,) is the place of one edge of each pair in the graph, ``source`` and
    ``target`` (P,) are its ends. Only the first ``mirrored`` pairs have both edges.
    ``recorded`` pairs are of a pass that becomes a program for any batch: shapes and
    loops may then not depend on numbers, so that every edge is a pair of its own and
    sums are those of the definition.
    """

    edge: Tensor
    source: Tensor
    target: Tensor
    mirrored: int
    recorded: bool = False

    @classmethod
    def of(cls, batch: Data) -> "Pairs":
        """Pairs of all edges of a batch, which must be distinct.

        Recorded ones where the batch has a true attribute ``recorded``.
        """
        if batch.get("recorded"):
            source, target = batch.edge_index
            edges = torch.arange(source.shape[0], device=source.device)
            return cls(edges, source, target, 0, recorded=True)
        codes = _pair_codes(batch)
        order = torch.argsort(codes, stable=True)
        both = codes[order].diff() == 0
        one, other = order[:-1][both], order[1:][both]
        alone = torch.ones_like(codes, dtype=torch.bool)
        alone[one] = alone[other] = False
        edge = torch.cat((one, alone.nonzero().squeeze(1)))
        source, target = batch.edge_index[:, edge]
        return cls(edge, source, target, len(one))

    def __len__(self) -> int:
        return len(self.edge)

    def __getitem__(self, part: slice) -> "Pairs":
        """Consecutive pairs, from ``part.start`` on."""
        mirrored = max(self.mirrored - part.start, 0)
        edge, source, target = self.edge[part], self.source[part], self.target[part]
        return Pairs(edge, source, target, min(mirrored, len(edge)), self.recorded)

    def directions(self) -> Iterator[tuple[slice, Tensor, Tensor, int]]:
        """Pairs that have an edge this way, its sources and targets, its sign."""
        yield slice(None), self.source, self.target, 1
        if self.mirrored:
            rows = slice(self.mirrored)
            yield rows, self.target[rows], self.source[rows], -1

    def sum_messages(self, x: Tensor, filters: Tensor) -> Tensor:
        """Sum of ``x[source] * filters`` over the edges into each atom, (N, F).

        Both edges of a pair have its row of ``filters`` (P, F).
        """
        total = torch.zeros_like(x, dtype=_sum_dtype(x))
        for rows, source, target, _ in self.directions():
            message = x[source] * filters[rows]
            total = total.index_add(0, target, message.to(total.dtype))
        return total


def _pair_codes(batch: Data) -> Tensor:
    """One integer per edge (E,), alike for mirror images and for nothing else."""
    source, target = batch.edge_index
    shift = batch.cell_offsets.long()
    base = 2 * int(shift.abs().max()) + 1 if len(shift) else 1
    # Odd in the shift, and smaller than half of what the atoms count in.
    code = (shift[:, 0] * base + shift[:, 1]) * base + shift[:, 2]
    atoms, unit = batch.num_nodes, base**3
    return torch.minimum(
        (source * atoms + target) * unit + code, (target * atoms + source) * unit - code
    )


def _sum_dtype(x: Tensor) -> torch.dtype:
    """Precision of sums of many messages: single at least."""
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True)
class EdgeTensors:
    """Edges as PaiNN's messages need them, a row for each pair.

    Radial ``basis`` (P, K + 1) with a last column for the bias: ones, or the envelope
    if ``smooth``. ``direction`` (P, 3) are unit vectors from target to source of the
    pairs' first edges.
    """

    pairs: Pairs
    basis: Tensor
    direction: Tensor
    smooth: bool = False

    def blocks(self, channels: int) -> Iterator["EdgeTensors"]:
        """Consecutive pieces whose (P, channels) tensors fit into a block."""
        row_bytes = channels * self.basis.element_size()
        block_bytes = _BLOCK_BYTES.get(self.basis.device.type, 1 << 29)
        size = max(block_bytes // row_bytes, _SMALLEST_BLOCK)
        for start in range(0, len(self.pairs), size):
            part = slice(start, start + size)
            basis, direction = self.basis[part], self.direction[part]
            yield EdgeTensors(self.pairs[part], basis, direction, self.smooth)

    def to(self, dtype: torch.dtype) -> "EdgeTensors":
        """The same edges with real numbers of ``dtype``."""
        basis, direction = self.basis.to(dtype), self.direction.to(dtype)
        return replace(self, basis=basis, direction=direction)


def sum_messages(
    y: Tensor, vec: Tensor | None, weight: Tensor, edges: EdgeTensors
) -> tuple[Tensor, Tensor]:
    """Sums over the edges into each atom: scalars (N, H) and vectors (N, 3, H).

    With ``(a, b, c) = y[source] * (basis @ weight.T)``, the sums are those of ``a`` and
    of ``vec[source] * b + direction * c``. Without ``vec`` there is no ``b``, and ``y``
    and ``weight`` have 2H channels instead of 3H. Messages have the precision of ``y``,
    their sums at least single precision.
    """
    weight, edges = weight.to(y.dtype), edges.to(y.dtype)
    vec = None if vec is None else vec.to(y.dtype)
    if edges.basis.requires_grad or edges.pairs.recorded:
        return _differentiable_sum(y, vec, weight, edges)
    dx, dvec = _BlockedSum.apply(y, vec, weight, edges)
    return dx, dvec


def _differentiable_sum(
    y: Tensor, vec: Tensor | None, weight: Tensor, edges: EdgeTensors
) -> tuple[Tensor, Tensor]:
    """Definition of the sums, for models that need derivatives of derivatives."""
    filters = edges.basis @ weight.t()  # (P, 3H)
    count = 2 if vec is None else 3
    width = y.shape[1] // count
    # Not len(y), which would be recorded as a constant.
    dx = y.new_zeros(y.shape[0], width, dtype=_sum_dtype(y))
    dvec = y.new_zeros(y.shape[0], 3, width, dtype=_sum_dtype(y))
    for rows, source, target, sign in edges.pairs.directions():
        parts = (y[source] * filters[rows]).chunk(count, dim=1)
        direction = sign * edges.direction[rows]
        vectors = direction[:, :, None] * parts[-1][:, None]  # (P, 3, H)
        if vec is not None:
            vectors = vectors + vec[source] * parts[1][:, None]
        dx = dx.index_add(0, target, parts[0].to(dx.dtype))
        dvec = dvec.index_add(0, target, vectors.to(dvec.dtype))
    return dx, dvec


class _BlockedSum(torch.autograd.Function):
    """:func:`_differentiable_sum` in blocks, with a backward pass that recomputes."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, vec: Tensor | None, weight: Tensor, edges: EdgeTensors
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(y, vec, weight)
        ctx.edges = edges
        count = 2 if vec is None else 3
        width = y.shape[1] // count
        dx = y.new_zeros(len(y), width, dtype=_sum_dtype(y))
        dvec = y.new_zeros(len(y), 3, width, dtype=_sum_dtype(y))
        for block in edges.blocks(y.shape[1]):
            filters = block.basis @ weight.t()  # (P, 3H)
            for rows, source, target, sign in block.pairs.directions():
                message = y.index_select(0, source).mul_(filters[rows])
                parts = message.chunk(count, dim=1)
                direction = block.direction[rows, :, None]
                if vec is None:
                    vectors = direction * parts[-1][:, None] * sign
                else:
                    vectors = vec.index_select(0, source)  # (P, 3, H)
                    vectors *= parts[1][:, None]
                    vectors.addcmul_(direction, parts[-1][:, None], value=sign)
                # Adding rows is several times slower where they are not contiguous.
                dx.index_add_(0, target, parts[0].contiguous().to(dx.dtype))
                dvec.index_add_(0, target, vectors.to(dvec.dtype))
        return dx, dvec

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y, vec, weight = ctx.saved_tensors
        grad_dx, grad_dvec = gradients
        dtype = _sum_dtype(y)
        grad_y = torch.zeros_like(y, dtype=dtype)
        grad_weight = torch.zeros_like(weight, dtype=dtype)
        grad_vec = None if vec is None else torch.zeros_like(vec, dtype=dtype)
        count = 2 if vec is None else 3
        for block in ctx.edges.blocks(y.shape[1]):
            filters = block.basis @ weight.t()  # (P, 3H)
            grad_filters = torch.zeros_like(filters)
            for rows, source, target, sign in block.pairs.directions():
                y_source = y.index_select(0, source)
                grad_vectors = grad_dvec.index_select(0, target).to(y.dtype)
                grad_message = torch.empty_like(y_source)
                parts = grad_message.chunk(count, dim=1)
                parts[0].copy_(grad_dx.index_select(0, target))
                direction = sign * block.direction[rows, :, None]
                _dot(grad_vectors, direction, out=parts[-1])
                if grad_vec is not None:
                    _dot(grad_vectors, vec.index_select(0, source), out=parts[1])
                    gate = (
                        filters[rows].chunk(3, dim=1)[1] * y_source.chunk(3, dim=1)[1]
                    )
                    grad_vectors *= gate[:, None]
                    grad_vec.index_add_(0, source, grad_vectors.to(dtype))
                grad_filters[rows].addcmul_(grad_message, y_source)
                grad_message *= filters[rows]
                grad_y.index_add_(0, source, grad_message.to(dtype))
            grad_weight.addmm_(grad_filters.t().to(dtype), block.basis.to(dtype))
        if grad_vec is not None:
            grad_vec = grad_vec.to(y.dtype)
        return grad_y.to(y.dtype), grad_vec, grad_weight.to(y.dtype), None


def _dot(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write the sum over xyz of two (P, 3, H) tensors to ``out`` (P, H)."""
    torch.mul(left[:, 0], right[:, 0], out=out)
    for axis in (1, 2):
        out.addcmul_(left[:, axis], right[:, axis])
