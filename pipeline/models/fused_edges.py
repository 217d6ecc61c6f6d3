"""PaiNN's edges by C functions: pairs, directions and radial basis.

They are what :mod:`pipeline.models.painn` defines, to rounding, without gradients.
"""

import torch
from torch import Tensor
from torch_geometric.data import Data

from pipeline.models.layers import NEGLIGIBLE, RadialBasis
from pipeline.models.messages import EdgeTensors, Pairs
from pipeline.native.library import Library, wanted_library


def fused_edges(
    batch: Data, positions: Tensor, radial_basis: RadialBasis, *, smooth: bool = False
) -> EdgeTensors | None:
    """Edges of ``batch``; None if they are to be built of torch operations.

    If ``smooth``, the last column of the basis is the envelope, else ones.
    """
    if positions.requires_grad or batch.get("recorded"):
        return None
    centres, cell, offsets = radial_basis.rbf.offset, batch.cell, batch.cell_offsets
    library = wanted_library(positions, centres, cell, offsets)
    if library is None:
        return None
    source, target = batch.edge_index.contiguous()
    found = _find_pairs(library, batch, source, target)
    if found is None:
        return None
    edge, mirrored = found
    count = len(edge)
    pairs = Pairs(edge, torch.empty_like(edge), torch.empty_like(edge), mirrored)
    length, direction = positions.new_empty(count), positions.new_empty(count, 3)
    library.call(
        *("pair_geometry", count, edge, source, target, offsets, positions, cell),
        *(batch.batch, torch.finfo(positions.dtype).tiny),
        *(pairs.source, pairs.target, length, direction),
    )
    basis = _basis(library, length, radial_basis, smooth=smooth)
    return EdgeTensors(pairs, basis, direction, smooth)


def _find_pairs(
    library: Library, batch: Data, source: Tensor, target: Tensor
) -> tuple[Tensor, int] | None:
    """One edge of each pair and the number of pairs with both, as `Pairs` has them."""
    edges, atoms = len(source), int(batch.num_nodes)
    first, mirror = source.new_empty(atoms + 1), torch.empty_like(source)
    edge, counts = torch.empty_like(source), source.new_empty(2)
    library.call(
        *("find_pairs", edges, atoms, source, target, batch.cell_offsets),
        *(first, mirror, edge, counts),
    )
    mirrored, alone = counts.tolist()
    return None if mirrored < 0 else (edge[: mirrored + alone], mirrored)


def _basis(
    library: Library, length: Tensor, radial_basis: RadialBasis, *, smooth: bool
) -> Tensor:
    """Basis (P, K) of lengths (P,) with a last column of ones or the envelope."""
    centres, cutoff = radial_basis.rbf.offset, radial_basis.cutoff
    count, size = len(length), len(centres)
    exponents, basis = length.new_empty(count, size), length.new_empty(count, size + 1)
    library.call(
        *("gaussian_exponents", count, size, float(cutoff)),
        *(radial_basis.rbf.deviation(), length, centres, exponents),
    )
    library.call(
        *("envelop", count, size, radial_basis.exponent, int(smooth)),
        *(float(cutoff), NEGLIGIBLE, length, exponents.exp_(), basis),
    )
    return basis
