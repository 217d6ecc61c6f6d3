"""Packing of structures and edges into one batch."""

import numpy as np
import pytest
import torch

from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import ExtraGraph, NeighborSpec, neighbor_edges

RULE = NeighborSpec(5.0, 20, symmetric=True)


@pytest.fixture
def structures(random_structure, make_structure):
    return [random_structure(3), make_structure([[0, 0, 0]]), random_structure(8)]


def test_every_sample_keeps_its_atoms_and_edges(structures):
    edges = [neighbor_edges(structure, RULE) for structure in structures]
    batch = collate(structures, edges, torch.float64)
    first_atom = first_edge = 0
    for index, (structure, own) in enumerate(zip(structures, edges, strict=True)):
        atoms = slice(first_atom, first_atom + len(structure))
        span = slice(first_edge, first_edge + len(own))
        np.testing.assert_array_equal(batch.positions[atoms], structure.positions)
        np.testing.assert_array_equal(
            batch.atomic_numbers[atoms], structure.atomic_numbers
        )
        np.testing.assert_array_equal(batch.tags[atoms], structure.tags)
        np.testing.assert_array_equal(batch.fixed[atoms], structure.fixed)
        assert (batch.batch[atoms] == index).all()
        np.testing.assert_array_equal(
            batch.edge_index[:, span] - first_atom, own.edge_index
        )
        np.testing.assert_array_equal(batch.cell_offsets[span], own.cell_offsets)
        np.testing.assert_array_equal(batch.cell[index], structure.cell)
        np.testing.assert_array_equal(batch.pbc[index], structure.pbc)
        first_atom, first_edge = atoms.stop, span.stop
    assert first_atom == len(batch.positions) == batch.num_nodes
    assert first_edge == batch.edge_index.shape[1]
    assert batch.natoms.tolist() == [len(structure) for structure in structures]


def test_edges_do_not_depend_on_the_batch(structures):
    edges = [neighbor_edges(structure, RULE) for structure in structures]
    before = [own.edge_index.copy() for own in edges]
    collate(structures, edges)
    for own, kept in zip(edges, before, strict=True):
        np.testing.assert_array_equal(own.edge_index, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types(structures, dtype):
    edges = [neighbor_edges(structure, RULE) for structure in structures]
    batch = collate(structures, edges, dtype)
    for name in ("positions", "cell", "cell_offsets"):
        assert batch[name].dtype == dtype
    for name in ("atomic_numbers", "batch", "natoms", "tags", "edge_index"):
        assert batch[name].dtype == torch.int64
    for name in ("pbc", "fixed"):
        assert batch[name].dtype == torch.bool
    assert batch.num_graphs == 3


def test_batch_without_edges(make_structure):
    atom = make_structure([[0, 0, 0]])
    batch = collate([atom, atom], [neighbor_edges(atom, RULE)] * 2)
    assert batch.edge_index.shape == (2, 0)
    assert batch.cell_offsets.shape == (0, 3)


def test_side_graphs_are_packed_like_the_main_one(structures):
    extra_graphs = (ExtraGraph("near", 3.0, 20), ExtraGraph("few", 5.0, 2))
    rule = NeighborSpec(5.0, 20, symmetric=True, extra_graphs=extra_graphs)
    edges = [neighbor_edges(structure, rule) for structure in structures]
    before = [own.extra_graphs["near"].edge_index.copy() for own in edges]
    batch = collate(structures, edges)
    for name in ("near", "few"):
        first_atom = first_edge = 0
        for structure, own in zip(structures, edges, strict=True):
            side = own.extra_graphs[name]
            span = slice(first_edge, first_edge + len(side))
            np.testing.assert_array_equal(
                batch[f"{name}_edge_index"][:, span] - first_atom, side.edge_index
            )
            np.testing.assert_array_equal(
                batch[f"{name}_cell_offsets"][span], side.cell_offsets
            )
            first_atom, first_edge = first_atom + len(structure), span.stop
        assert first_edge == batch[f"{name}_edge_index"].shape[1] > 0
        assert batch[f"{name}_edge_index"].dtype == torch.int64
        assert batch[f"{name}_cell_offsets"].dtype == batch.positions.dtype
    for own, kept in zip(edges, before, strict=True):
        np.testing.assert_array_equal(own.extra_graphs["near"].edge_index, kept)
