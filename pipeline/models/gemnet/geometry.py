"""Distances, directions and angular functions of a batch."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch_geometric.data import Data

from pipeline.models.gemnet.tables import QuadTables
from pipeline.models.layers import edge_vectors

# Below this sine (not normalised) a dihedral angle counts as undefined.
_SMALLEST_SINE = 1e-9


@dataclass(frozen=True)
class EdgeGeometry:
    """``distance`` (E,) in Å and ``unit`` (E, 3) from source image to target."""

    distance: Tensor
    unit: Tensor


@dataclass(frozen=True)
class QuadAngles:
    """Angular functions of quadruplets, Q middle edges, S functions each.

    ``out`` (Q, out slots, S) of the angle at a, ``inside`` (Q, in slots, S) of the
    angle at b, ``dihedral`` (Q, out slots, S, in slots); zero where no path exists.
    """

    out: Tensor
    inside: Tensor
    dihedral: Tensor


def edge_geometry(batch: Data, positions: Tensor, prefix: str = "") -> EdgeGeometry:
    """Geometry of the edges ``<prefix>edge_index`` for ``positions`` (N, 3) in Å."""
    vector = -edge_vectors(batch, positions, prefix)
    distance = vector.square().sum(dim=1).sqrt()
    return EdgeGeometry(distance, vector / distance[:, None])


def legendre(cosine: Tensor, count: int) -> list[Tensor]:
    """``sqrt((2l+1)/(4π)) P_l`` of each entry, for l = 0 .. count - 1."""
    values = [torch.ones_like(cosine), cosine]
    for degree in range(2, count):
        grow = (2 * degree - 1) / degree * cosine * values[-1]
        values.append(grow - (degree - 1) / degree * values[-2])
    return [
        value * math.sqrt((2 * degree + 1) / (4 * math.pi))
        for degree, value in enumerate(values[:count])
    ]


def pair_angles(
    first: Tensor, second: Tensor, out_mask: Tensor, num_spherical: int
) -> Tensor:
    """Functions (N, D, S, G) of the angles between edges into the same atom.

    ``first`` (N, D, 3) and ``second`` (N, G, 3) are unit vectors by slot; where
    ``out_mask`` (N, D, G) is False the result is zero.
    """
    cosine = _dot(first[:, :, None], second[:, None]).clamp(-1, 1)
    functions = torch.stack(legendre(cosine, num_spherical), dim=2)
    return functions * out_mask[:, :, None]


def quad_angles(
    main: EdgeGeometry, quad: EdgeGeometry, tables: QuadTables, num_spherical: int
) -> QuadAngles:
    """Angular functions of all quadruplets d -> b -> a <- c."""
    outer = tables.out_slots.pad(main.unit[tables.out_edges])[tables.out_row]
    inner = tables.in_slots.pad(main.unit[tables.in_edges])[tables.in_row]
    middle = quad.unit[:, None]  # (Q, 1, 3)
    out = torch.stack(legendre(_dot(outer, middle).clamp(-1, 1), num_spherical), dim=2)
    # The unit vectors point d -> b -> a, so this is minus the cosine of the angle
    # a-b-d; the released weights are trained with it.
    inside = torch.stack(
        legendre(_dot(middle, inner).clamp(-1, 1), num_spherical), dim=2
    )
    cosine = _dihedral_cosine(outer, inner, middle)
    dihedral = torch.stack(legendre(cosine, num_spherical), dim=2)
    return QuadAngles(
        out=out * tables.out_mask[:, :, None],
        inside=inside * tables.in_mask[:, :, None],
        dihedral=dihedral * tables.quad_mask[:, :, None],
    )


def _dihedral_cosine(outer: Tensor, inner: Tensor, middle: Tensor) -> Tensor:
    """Cosine (Q, O, I) of the unsigned angle between both planes that hold ``middle``.

    Equals ``cos(atan2(max(|p x w|, 1e-9), p . w))`` with the normals p and w, since
    ``|p x w|² + (p . w)² = |p|² |w|²``.
    """
    p = torch.linalg.cross(outer, middle.expand_as(outer))  # (Q, O, 3)
    w = torch.linalg.cross(inner, middle.expand_as(inner))  # (Q, I, 3)
    dot = _dot(p[:, :, None], w[:, None])
    lengths = p.square().sum(dim=2)[:, :, None] * w.square().sum(dim=2)[:, None]
    smallest = dot.square() + _SMALLEST_SINE**2
    # Below the smallest normal number of single precision the square would vanish.
    squared = torch.maximum(lengths, smallest).clamp_min(torch.finfo(dot.dtype).tiny)
    return dot / squared.sqrt()


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Inner product over the last axis of three, by broadcasting.

    Not a matrix product, which reduced-precision modes would round.
    """
    return (
        first[..., 0] * second[..., 0]
        + first[..., 1] * second[..., 1]
        + first[..., 2] * second[..., 2]
    )
