"""Projections of radial and angular bases that all blocks share."""

import math

import torch
from torch import Tensor, nn

from pipeline.models.gemnet.layers import Dense
from pipeline.models.layers import RadialBasis

# Rows of a long radial basis that are in memory at a time (a few MB).
_ROWS = 8192


class CosineBasis(nn.Module):
    """Holds the radial part of a circular basis under the name checkpoints use."""

    def __init__(self, num_radial: int, cutoff: float, exponent: int) -> None:
        super().__init__()
        self.radial_basis = RadialBasis(num_radial, cutoff, exponent, exact_width=True)

    def forward(self, distance: Tensor) -> Tensor:
        """Radial basis (E, R) of distances (E,) in Å."""
        return self.radial_basis(distance)


class RadialAngularProjection(nn.Module):
    """One matrix per edge that maps angular functions to ``out`` channels."""

    def __init__(self, num_radial: int, num_angular: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_radial, num_angular, out))
        self.shape = (out, num_angular)
        _initialise(self.weight)

    def forward(self, radial: Tensor) -> Tensor:
        """Matrices (E, out, num_angular) of radial bases (E, num_radial).

        The weights are stored with shape (radial, angular, out) but their memory is
        meant as (radial, out, angular): no transposition.
        """
        return (radial @ self.weight.flatten(1)).view(-1, *self.shape)


def radial_projection(num_radial: int, out: int) -> Dense:
    """Linear map (E, num_radial) to (E, out)."""
    return Dense(num_radial, out, activated=False)


def sum_over_images(
    distance: Tensor, pair: Tensor, count: int, basis: nn.Module, linear: nn.Module
) -> Tensor:
    """Projected basis of ``distance`` (E,), summed over edges of one ``pair`` (E,).

    Returns (count, out). The whole basis of all atom pairs within 12 Å would be the
    largest array of the network, so it is made piece by piece.
    """
    total: Tensor | None = None
    for rows in torch.arange(len(distance), device=distance.device).split(_ROWS):
        values = linear(basis(distance[rows]))
        if total is None:
            total = values.new_zeros(count, values.shape[1])
        total = total.index_add(0, pair[rows], values)
    assert total is not None  # an atom graph has at least the edges of the main graph
    return total


def _initialise(weight: Tensor) -> None:
    """Orthogonal, then standardised over radial and angular functions per channel."""
    if weight.is_meta:  # about to be filled from a file
        return
    nn.init.orthogonal_(weight)
    with torch.no_grad():
        fan_in = weight.shape[0] * weight.shape[1]
        variance, mean = torch.var_mean(weight, dim=(0, 1), keepdim=True)
        weight.copy_((weight - mean) / ((variance + 1e-6).sqrt() * math.sqrt(fan_in)))
