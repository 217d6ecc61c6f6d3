"""Packs structures and their edges into one graph that models read."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch_geometric.data import Data

from pipeline.graphs.neighbors import Edges
from pipeline.structure import Structure


def collate(
    structures: Sequence[Structure],
    edges: Sequence[Edges],
    dtype: torch.dtype = torch.float32,
) -> Data:
    """One disconnected graph of all structures, atoms and edges in the given order.

    Tensors: ``atomic_numbers`` (N,), ``positions`` (N, 3) in Å, ``cell`` (B, 3, 3) in
    Å, ``pbc`` (B, 3), ``batch`` (N,) index of the structure, ``natoms`` (B,), ``tags``
    (N,), ``fixed`` (N,), ``edge_index`` (2, E) and ``cell_offsets`` (E, 3); real
    numbers have ``dtype``, integers are int64. ``num_graphs`` is B, ``crowded`` the
    number of atoms that met the neighbour limit. Side graphs come as
    ``<name>_edge_index`` and ``<name>_cell_offsets``.
    """
    natoms = np.array([len(structure) for structure in structures])
    first_atom = np.cumsum(natoms) - natoms
    graphs = _pack_edges(edges, first_atom, dtype)
    for name in edges[0].extra_graphs:
        arrays = _pack_edges([e.extra_graphs[name] for e in edges], first_atom, dtype)
        graphs |= {f"{name}_{key}": value for key, value in arrays.items()}

    def packed(name: str, kind: type) -> torch.Tensor:
        values = [getattr(structure, name) for structure in structures]
        return torch.from_numpy(np.concatenate(values, dtype=kind, casting="unsafe"))

    return Data(
        atomic_numbers=packed("atomic_numbers", np.int64),
        positions=packed("positions", np.float64).to(dtype),
        cell=packed("cell", np.float64).view(-1, 3, 3).to(dtype),
        pbc=packed("pbc", np.bool_).view(-1, 3),
        batch=torch.from_numpy(np.repeat(np.arange(len(natoms)), natoms)),
        natoms=torch.from_numpy(natoms),
        tags=packed("tags", np.int64),
        fixed=packed("fixed", np.bool_),
        num_graphs=len(structures),
        num_nodes=int(natoms.sum()),
        crowded=sum(e.crowded for e in edges),
        **graphs,
    )


def _pack_edges(
    edges: Sequence[Edges], first_atom: npt.NDArray[np.int64], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Edges of one kind of all structures, numbered over the batch."""
    edge_index = np.concatenate([e.edge_index for e in edges], axis=1)
    edge_index += np.repeat(first_atom, [len(e) for e in edges])
    offsets = np.concatenate([e.cell_offsets for e in edges])
    return {
        "edge_index": torch.from_numpy(edge_index),
        "cell_offsets": torch.from_numpy(offsets).to(dtype),
    }
