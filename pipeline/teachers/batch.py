"""Structures and edges as the tensors that most potentials read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.graphs.neighbors import Edges
from pipeline.structure import Structure
from pipeline.teachers.potential import SampleGraph


@dataclass(frozen=True)
class GraphBatch:
    """Graphs side by side, in their order; integers are int64.

    ``atomic_numbers`` (N,), ``batch`` (N,) graph of every atom, ``n_atoms`` (B,),
    ``edge_index`` (2, E) rows source and target, numbered over the batch.
    """

    atomic_numbers: Tensor
    batch: Tensor
    n_atoms: Tensor
    edge_index: Tensor

    def sum_atoms(self, values: Tensor) -> Tensor:
        """Sum of ``values`` (N,) over the atoms of every graph, (B,), same dtype."""
        total = values.new_zeros(len(self.n_atoms))
        return total.index_add_(0, self.batch, values)


def collate_graphs(graphs: Sequence[SampleGraph], device: torch.device) -> GraphBatch:
    """One batch of ``graphs`` on ``device``."""
    counts = np.array([len(graph.structure) for graph in graphs])
    first = np.cumsum(counts) - counts
    numbers = np.concatenate([graph.structure.atomic_numbers for graph in graphs])
    edges = np.concatenate(
        [graph.edges.edge_index + at for graph, at in zip(graphs, first, strict=True)],
        axis=1,
    )
    return GraphBatch(
        torch.from_numpy(numbers.astype(np.int64)).to(device),
        torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(device),
        torch.from_numpy(counts).to(device),
        torch.from_numpy(edges).to(device),
    )


def structure_edge_vectors(
    structure: Structure, edges: Edges
) -> npt.NDArray[np.float64]:
    """Vectors (E, 3) in Å from the target to the image of the source."""
    source, target = edges.edge_index
    shift = edges.cell_offsets @ np.asarray(structure.cell, np.float64)
    vectors: npt.NDArray[np.float64] = (
        structure.positions[source] + shift - structure.positions[target]
    )
    return vectors
