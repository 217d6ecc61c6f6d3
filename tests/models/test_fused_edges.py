"""Pairs and geometry by C functions against those of torch operations."""

import dataclasses

import pytest
import torch

from pipeline.models.fused_edges import fused_edges
from pipeline.models.zoo import build_model
from pipeline.native.library import find_library, native_kernels

SIZES = {"hidden_channels": 4, "num_layers": 1, "num_rbf": 6, "cutoff": 4.0}


@pytest.fixture(autouse=True)
def _compiler():
    if find_library(torch.float64) is None:
        pytest.skip("there is no C compiler")


@pytest.fixture(params=[False, True], ids=["original", "smooth"])
def model(request):
    return build_model("painn", SIZES | {"smooth": request.param}).double()


def single_edges(edges):
    """Source, target, direction and basis of every edge in an order of their own."""
    rows = []
    for part, source, target, sign in edges.pairs.directions():
        columns = (source[:, None], target[:, None], sign * edges.direction[part])
        rows.append(torch.cat((*columns, edges.basis[part]), dim=1))
    table = torch.cat(rows)
    order = sorted(range(len(table)), key=lambda i: table[i].round(decimals=8).tolist())
    return table[order]


def assert_same_edges(model, batch):
    smooth = model.options.smooth
    with native_kernels(True):
        fused = fused_edges(batch, batch.positions, model.radial_basis, smooth=smooth)
    assert fused.smooth == smooth
    plain = model._edges(batch, batch.positions)
    assert fused.pairs.mirrored == plain.pairs.mirrored
    assert len(fused.pairs) == len(plain.pairs)
    torch.testing.assert_close(single_edges(fused), single_edges(plain))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("limit", [3, 50, None])
def test_edges_are_those_of_torch(model, molecules, atom, batch_of, symmetric, limit):
    rule = dataclasses.replace(
        model.graph_rule, symmetric=symmetric, max_neighbors=limit
    )
    batch = batch_of([*molecules, atom], rule)
    assert batch.cell_offsets.any()
    assert_same_edges(model, batch)


def test_a_graph_without_edges(model, atom, batch_of):
    assert_same_edges(model, batch_of([atom, atom], model.graph_rule))


@pytest.mark.parametrize("exact", [True, False])
def test_both_widths_of_gaussians(model, molecules, batch_of, exact):
    model.radial_basis.rbf.width = 0.3 if exact else None
    assert_same_edges(model, batch_of(molecules, model.graph_rule))


def test_edges_in_another_order_are_left_to_torch(model, molecules, batch_of):
    batch = batch_of(molecules, model.graph_rule)
    batch.edge_index = batch.edge_index.flip(1)
    batch.cell_offsets = batch.cell_offsets.flip(0)
    with native_kernels(True):
        assert fused_edges(batch, batch.positions, model.radial_basis) is None
        forces = model(batch).forces
    torch.testing.assert_close(forces, model(batch).forces)


def test_positions_with_a_gradient_are_left_to_torch(model, molecules, batch_of):
    batch = batch_of(molecules, model.graph_rule)
    with native_kernels(True):
        moved = batch.positions.clone().requires_grad_()
        assert fused_edges(batch, moved, model.radial_basis) is None
        assert fused_edges(batch, batch.positions, model.radial_basis) is not None
