"""PaiNN's layers as one operation each, with hand-written gradients.

They compute what :mod:`pipeline.models.painn` defines, to rounding. Gradients of
positions and second derivatives are left to the definition.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from pipeline.models.messages import EdgeTensors
from pipeline.native.library import Library, wanted_library

_ACTIVATION_SCALE = 1 / 0.6
# Larger filters are computed again in the backward pass, in blocks.
_KEPT_BYTES = 8 << 20


def fused_library(x: Tensor, edges: EdgeTensors) -> Library | None:
    """Functions for layers on the states ``x``, if they are to run as one operation.

    There is one precision, and no gradient of positions is asked for.
    """
    if edges.basis.requires_grad or edges.pairs.recorded:
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    return wanted_library(x, edges.basis)


class FusedMessage(torch.autograd.Function):
    """A message layer: normed scalars, their projection, filters, sums, residuals.

    ``vec`` is None while all vectors are zero.
    """

    @staticmethod
    def forward(
        ctx: Any,
        library: Library,
        edges: EdgeTensors,
        epsilon: float,
        x: Tensor,
        vec: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        filter_weight: Tensor,
        filter_bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        count, width = x.shape
        x = x.contiguous()
        vec = None if vec is None else vec.contiguous()
        normed, mean, inverse_deviation = torch.native_layer_norm(
            x, (width,), norm_weight, norm_bias, epsilon
        )
        hidden = torch.addmm(bias1, normed, weight1.t())
        active = silu(hidden)
        y = torch.addmm(bias2, active, weight2.t(), alpha=_ACTIVATION_SCALE)
        new_x = x.clone()
        new_vec = x.new_zeros(count, 3, width) if vec is None else vec.clone()
        pieces = _pieces(edges, 3 * width)
        kept = []
        for piece in pieces:
            filters = _filters(piece, filter_weight, filter_bias)
            library.call(
                "sum_messages", *_edges(piece, width, filters), y, vec, new_x, new_vec
            )
            kept.append(filters)
        ctx.library, ctx.pieces = library, pieces
        ctx.filters = kept if len(kept) == 1 else [None] * len(kept)
        ctx.save_for_backward(
            *(x, vec, norm_weight, norm_bias, mean, inverse_deviation, normed),
            *(weight1, hidden, active, weight2, y, filter_weight, filter_bias),
        )
        return new_x.mul_(math.sqrt(0.5)), new_vec

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, vec, norm_weight, norm_bias, mean, inverse_deviation, normed, *rest = (
            ctx.saved_tensors
        )
        weight1, hidden, active, weight2, y, filter_weight, filter_bias = rest
        width = x.shape[1]
        grad_dx = gradients[0] * math.sqrt(0.5)
        grad_dvec = gradients[1].contiguous()
        grad_y = torch.zeros_like(y)
        grad_vec = None if vec is None else grad_dvec.clone()
        grad_filter = filter_weight.new_zeros(3 * width, filter_weight.shape[1] + 1)
        for piece, kept in zip(ctx.pieces, ctx.filters, strict=True):
            filters = kept
            if filters is None:
                filters = _filters(piece, filter_weight, filter_bias)
            grad_filters = torch.zeros_like(filters)
            ctx.library.call(
                "sum_messages_backward",
                *_edges(piece, width, filters),
                *(y, vec, grad_dx, grad_dvec, grad_y, grad_vec, grad_filters),
            )
            grad_filter.addmm_(grad_filters.t(), piece.basis)
        grad_normed, *grads = _perceptron_backward(
            grad_y, normed, weight1, hidden, active, weight2
        )
        grad_x, grad_norm_weight, grad_norm_bias = (
            torch.ops.aten.native_layer_norm_backward(
                *(grad_normed, x, (width,), mean, inverse_deviation),
                *(norm_weight, norm_bias, [True, True, True]),
            )
        )
        return (
            *(None, None, None, grad_x.add_(grad_dx), grad_vec),
            *(grad_norm_weight, grad_norm_bias, *grads),
            *(grad_filter[:, :-1], grad_filter[:, -1]),
        )


class FusedUpdate(torch.autograd.Function):
    """An update layer: two projections of the vectors, their lengths, three gates."""

    @staticmethod
    def forward(
        ctx: Any,
        library: Library,
        x: Tensor,
        vec: Tensor,
        vec_weight: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
    ) -> tuple[Tensor, Tensor]:
        count, width = x.shape
        x, vec = x.contiguous(), vec.contiguous()
        v = vec.view(-1, width) @ vec_weight.t()  # (3N, 2H)
        joined, dot = x.new_empty(count, 2 * width), torch.empty_like(x)
        library.call("join_lengths", count, width, x, v, joined, dot)
        hidden = torch.addmm(bias1, joined, weight1.t())
        active = silu(hidden)
        gates = torch.addmm(bias2, active, weight2.t(), alpha=_ACTIVATION_SCALE)
        new_x, new_vec = torch.empty_like(x), torch.empty_like(vec)
        library.call("gate", count, width, x, vec, v, dot, gates, new_x, new_vec)
        ctx.library = library
        ctx.save_for_backward(
            *(vec, vec_weight, v, joined, dot),
            *(weight1, hidden, active, weight2, gates),
        )
        return new_x, new_vec

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        vec, vec_weight, v, joined, dot, *rest = ctx.saved_tensors
        weight1, hidden, active, weight2, gates = rest
        count, width = dot.shape
        grad_x, grad_vec = (gradient.contiguous() for gradient in gradients)
        grad_v, grad_dot = torch.empty_like(v), torch.empty_like(dot)
        grad_gates = torch.empty_like(gates)
        ctx.library.call(
            "gate_backward",
            *(count, width, v, dot, gates, grad_x, grad_vec),
            *(grad_v, grad_dot, grad_gates),
        )
        grad_joined, *grads = _perceptron_backward(
            grad_gates, joined, weight1, hidden, active, weight2
        )
        grad_x = grad_x.clone()
        ctx.library.call(
            "join_lengths_backward",
            *(count, width, v, joined, grad_joined, grad_dot, grad_x, grad_v),
        )
        rows = vec.view(-1, width)
        grad_vec = torch.addmm(grad_vec.view(-1, width), grad_v, vec_weight)
        return (
            *(None, grad_x, grad_vec.view(vec.shape)),
            *(grad_v.t() @ rows, *grads),
        )


def _perceptron_backward(
    grad: Tensor,
    given: Tensor,
    weight1: Tensor,
    hidden: Tensor,
    active: Tensor,
    weight2: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of a perceptron's input, first and second weights and biases.

    The perceptron is ``weight2 @ silu(hidden) / 0.6``, ``hidden = weight1 @ given``,
    with biases; ``grad`` (N, O) is the gradient of its result.
    """
    grad_active = _scaled_product(grad, weight2)
    grad_hidden = torch.ops.aten.silu_backward(grad_active, hidden)
    return (
        grad_hidden @ weight1,
        grad_hidden.t() @ given,
        grad_hidden.sum(dim=0),
        _scaled_product(grad.t(), active),
        grad.sum(dim=0),
    )


def _scaled_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right / 0.6`` in one operation."""
    unread = left.new_empty(1)
    return torch.addmm(unread, left, right, beta=0, alpha=_ACTIVATION_SCALE)


def _pieces(edges: EdgeTensors, channels: int) -> list[EdgeTensors]:
    """All edges, or blocks of them if their filters would need much memory."""
    size = len(edges.pairs) * channels * edges.basis.element_size()
    return [edges] if size <= _KEPT_BYTES else list(edges.blocks(channels))


def _filters(edges: EdgeTensors, weight: Tensor, bias: Tensor) -> Tensor:
    """Filters (P, 3H); the last column of the basis is the bias's."""
    if edges.smooth:
        bias = edges.basis[:, -1:] * bias
    return torch.addmm(bias, edges.basis[:, :-1], weight.t())


def _edges(
    edges: EdgeTensors, width: int, filters: Tensor
) -> tuple[int | Tensor | None, ...]:
    """What both sums of messages take first."""
    pairs = edges.pairs
    return (
        *(len(pairs), pairs.mirrored, width),
        *(pairs.source.contiguous(), pairs.target.contiguous()),
        *(filters, edges.direction.contiguous()),
    )
