"""Layers without biases that all parts of GemNet-OC are made of."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from pipeline.models.layers import ScaleFactor

INV_SQRT_2 = 1 / math.sqrt(2)
_ACTIVATION_SCALE = 1 / 0.6


class Dense(nn.Module):
    """``silu(W x) / 0.6``, or ``W x`` without activation."""

    def __init__(self, in_width: int, out_width: int, *, activated: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(in_width, out_width, bias=False)
        self.activated = activated
        he_orthogonal_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Values (..., out_width) of ``x`` (..., in_width)."""
        x = self.linear(x)
        return activate(x) if self.activated else x


class Residual(nn.Module):
    """``(x + dense(dense(x))) / sqrt(2)``, both layers activated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense_mlp = nn.Sequential(
            Dense(width, width, activated=True), Dense(width, width, activated=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Values of the shape of ``x``."""
        return average(x, self.dense_mlp(x))


class Scale(ScaleFactor):
    """A scale factor that is told what it was fitted to.

    ``reference`` is the quantity whose variance the product had when the number was
    fitted; it takes no part in the result.
    """

    def forward(self, x: Tensor, reference: Tensor) -> Tensor:  # type: ignore[override]
        """Product of ``x`` and the factor."""
        return multiply(x, self.scale_factor.to(x.dtype))


def activate(x: Tensor) -> Tensor:
    """``silu(x) / 0.6``; overwrites ``x`` when no gradients are recorded."""
    if torch.is_grad_enabled():
        return silu(x) * _ACTIVATION_SCALE
    return silu(x, inplace=True).mul_(_ACTIVATION_SCALE)


def average(first: Tensor, fresh: Tensor) -> Tensor:
    """``(first + fresh) / sqrt(2)``; overwrites ``fresh`` without gradients."""
    if torch.is_grad_enabled():
        return (first + fresh) * INV_SQRT_2
    return fresh.add_(first).mul_(INV_SQRT_2)


def multiply(fresh: Tensor, factor: Tensor) -> Tensor:
    """``fresh * factor``; overwrites ``fresh`` without gradients."""
    return fresh * factor if torch.is_grad_enabled() else fresh.mul_(factor)


def divide_sum(fresh: Tensor, others: Iterable[Tensor], divisor: float) -> Tensor:
    """``(fresh + sum of others) / divisor``; overwrites ``fresh`` without gradients."""
    for other in others:
        fresh = fresh + other if torch.is_grad_enabled() else fresh.add_(other)
    return fresh / divisor if torch.is_grad_enabled() else fresh.div_(divisor)


def split_linear(weight: Tensor, *parts: Tensor) -> Iterator[Tensor]:
    """``x W_xᵀ`` of every part ``x``, where ``weight`` acts on all parts side by side.

    Their sum is the layer applied to the concatenation, which is never made.
    """
    first = 0
    for part in parts:
        yield linear(part, weight[:, first : first + part.shape[1]])
        first += part.shape[1]


def residuals(count: int, width: int) -> nn.ModuleList:
    """``count`` residual layers of one width."""
    return nn.ModuleList(Residual(width) for _ in range(count))


def through(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """``x`` passed through all ``layers``."""
    for layer in layers:
        x = layer(x)
    return x


def he_orthogonal_(weight: Tensor) -> None:
    """Fill (out, ..., in) weights: orthogonal, then every row standardised.

    Rows get mean 0 and, over the fan-in, variance 1 / fan-in (Saxe et al. 2013 with the
    variance of He et al. 2015, as GemNet initialises its layers).
    """
    if weight.is_meta:  # about to be filled from a file
        return
    nn.init.orthogonal_(weight)
    with torch.no_grad():
        fan_in = weight[0].numel()
        axes = tuple(range(1, weight.ndim))
        variance, mean = torch.var_mean(weight, dim=axes, keepdim=True)
        weight.copy_((weight - mean) / ((variance + 1e-6).sqrt() * math.sqrt(fan_in)))
