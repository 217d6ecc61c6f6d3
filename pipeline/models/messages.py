"""PaiNN's message sum, in blocks of edges that stay in the processor's cache.

The sum is bound by memory traffic: with all edges at once, every temporary has E times
3H numbers. Blocks keep them small, and the backward pass computes them again instead of
storing them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bytes of one block's filters: half of a common second-level cache, or, where
# launching a kernel is what costs, a modest share of a GPU's memory.
_BLOCK_BYTES = {"cpu": 1 << 19, "cuda": 1 << 29}


@dataclass(frozen=True)
class EdgeTensors:
    """Edges as the messages need them.

    ``source`` and ``target`` (E,), radial ``basis`` (E, K + 1) with a last column of
    ones for the bias, ``direction`` (E, 3) unit vectors from target to source.
    """

    source: Tensor
    target: Tensor
    basis: Tensor
    direction: Tensor

    def blocks(self, channels: int) -> Iterator["EdgeTensors"]:
        """Consecutive pieces whose (E, channels) tensors fit into a block."""
        row_bytes = channels * self.basis.element_size()
        size = max(_BLOCK_BYTES.get(self.basis.device.type, 1 << 29) // row_bytes, 32)
        for start in range(0, len(self.source), size):
            part = slice(start, start + size)
            yield EdgeTensors(
                self.source[part],
                self.target[part],
                self.basis[part],
                self.direction[part],
            )


def sum_messages(
    y: Tensor, vec: Tensor | None, weight: Tensor, edges: EdgeTensors
) -> tuple[Tensor, Tensor]:
    """Sums over the edges into each atom: scalars (N, H) and vectors (N, 3, H).

    With ``(a, b, c) = y[source] * (basis @ weight.T)``, the sums are those of ``a`` and
    of ``vec[source] * b + direction * c``. Without ``vec`` there is no ``b``, and ``y``
    and ``weight`` have 2H channels instead of 3H.
    """
    if edges.basis.requires_grad:
        return _differentiable_sum(y, vec, weight, edges)
    dx, dvec = _BlockedSum.apply(y, vec, weight, edges)
    return dx, dvec


def _differentiable_sum(
    y: Tensor, vec: Tensor | None, weight: Tensor, edges: EdgeTensors
) -> tuple[Tensor, Tensor]:
    """Definition of the sums, for models that need derivatives of derivatives."""
    message = y[edges.source] * (edges.basis @ weight.t())  # (E, 3H)
    parts = message.chunk(2 if vec is None else 3, dim=1)
    vectors = edges.direction[:, :, None] * parts[-1][:, None]  # (E, 3, H)
    if vec is not None:
        vectors = vectors + vec[edges.source] * parts[1][:, None]
    dx = parts[0].new_zeros(len(y), parts[0].shape[1])
    dvec = vectors.new_zeros(len(y), *vectors.shape[1:])
    return (
        dx.index_add(0, edges.target, parts[0]),
        dvec.index_add(0, edges.target, vectors),
    )


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
        dx = y.new_zeros(len(y), width)
        dvec = y.new_zeros(len(y), 3, width)
        for block in edges.blocks(y.shape[1]):
            message = block.basis @ weight.t()  # (E, 3H)
            message *= y.index_select(0, block.source)
            parts = message.chunk(count, dim=1)
            if vec is None:
                vectors = block.direction[:, :, None] * parts[-1][:, None]
            else:
                vectors = vec.index_select(0, block.source)  # (E, 3, H)
                vectors *= parts[1][:, None]
                vectors.addcmul_(block.direction[:, :, None], parts[-1][:, None])
            # Adding rows is several times slower where they are not contiguous.
            dx.index_add_(0, block.target, parts[0].contiguous())
            dvec.index_add_(0, block.target, vectors)
        return dx, dvec

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y, vec, weight = ctx.saved_tensors
        grad_dx, grad_dvec = gradients
        grad_y, grad_weight = torch.zeros_like(y), torch.zeros_like(weight)
        grad_vec = None if vec is None else torch.zeros_like(vec)
        count = 2 if vec is None else 3
        for block in ctx.edges.blocks(y.shape[1]):
            filters = block.basis @ weight.t()  # (E, 3H)
            y_source = y.index_select(0, block.source)
            grad_vectors = grad_dvec.index_select(0, block.target)  # (E, 3, H)
            grad_message = torch.empty_like(filters)
            parts = grad_message.chunk(count, dim=1)
            parts[0].copy_(grad_dx.index_select(0, block.target))
            _dot(grad_vectors, block.direction[:, :, None], out=parts[-1])
            if grad_vec is not None:
                _dot(grad_vectors, vec.index_select(0, block.source), out=parts[1])
                gate = filters.chunk(3, dim=1)[1] * y_source.chunk(3, dim=1)[1]
                grad_vectors *= gate[:, None]
                grad_vec.index_add_(0, block.source, grad_vectors)
            filters *= grad_message
            grad_y.index_add_(0, block.source, filters)
            grad_message *= y_source
            grad_weight.addmm_(grad_message.t(), block.basis)
        return grad_y, grad_vec, grad_weight, None


def _dot(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write the sum over xyz of two (E, 3, H) tensors to ``out`` (E, H)."""
    torch.mul(left[:, 0], right[:, 0], out=out)
    for axis in (1, 2):
        out.addcmul_(left[:, axis], right[:, axis])
