"""Displaced copies of some graphs of a batch, which a term of the loss asks for."""

import copy
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch_geometric.data import Data

from pipeline.models.output import ModelOutput

_OFFSETS = "_cell_offsets"
_INDEX = "_edge_index"


@dataclass(frozen=True)
class Displacements:
    """One moved coordinate in each of D copies of graphs, the other atoms unchanged.

    ``graph`` (D,) int64 is the copied graph, ``column`` (D,) int64 the coordinate
    ``3 * atom + axis`` inside it, ``shift`` (D,) float32 its change in Å.
    """

    graph: Tensor
    column: Tensor
    shift: Tensor

    def __len__(self) -> int:
        return len(self.graph)


def append_displaced(batch: Data, moves: Displacements) -> Data:
    """Return ``batch`` with a displaced copy of ``moves.graph`` each at its end.

    Copies have the edges of their graph, also those that are longer than the cutoff
    after the move: limits of neighbours would make outputs jump. Only the input of
    models is extended, not labels and features.
    """
    first = batch.natoms.cumsum(0) - batch.natoms
    counts = batch.natoms[moves.graph]
    rows, owner = _rows(first[moves.graph], counts)
    begin = batch.positions.shape[0] + counts.cumsum(0) - counts
    found = copy.copy(batch)
    positions = batch.positions[rows]
    moved = begin - batch.positions.shape[0] + torch.div(moves.column, 3).floor().long()
    shifts = torch.zeros_like(positions)
    shifts[moved, moves.column % 3] = moves.shift.to(positions.dtype)
    found.positions = torch.cat((batch.positions, positions + shifts))
    for name in ("atomic_numbers", "tags", "fixed"):
        found[name] = torch.cat((batch[name], batch[name][rows]))
    for name in ("cell", "pbc", "natoms"):
        found[name] = torch.cat((batch[name], batch[name][moves.graph]))
    found.batch = torch.cat((batch.batch, batch.num_graphs + owner))
    for name in _edge_kinds(batch):
        _append_edges(found, batch, name, moves.graph, begin - first[moves.graph])
    found.num_graphs = batch.num_graphs + len(moves)
    found.num_nodes = found.positions.shape[0]
    return found


def split_output(output: ModelOutput, batch: Data) -> tuple[ModelOutput, ModelOutput]:
    """Divide ``output`` into that of ``batch`` and that of the copies at its end."""
    edges = batch.edge_index.shape[1]
    return _divide(output, batch.num_graphs, batch.positions.shape[0], edges)


def split_copies(
    output: ModelOutput, graphs: int, atoms: int
) -> tuple[ModelOutput, ModelOutput]:
    """Divide the ``output`` of copies after the first ``graphs`` with ``atoms``.

    States of edges stay with the rest.
    """
    return _divide(output, graphs, atoms, 0)


def _divide(
    output: ModelOutput, graphs: int, atoms: int, edges: int
) -> tuple[ModelOutput, ModelOutput]:
    ends = {"energy": graphs, "virial": graphs, "edge_features": edges}
    parts: list[dict[str, Tensor]] = [{}, {}]
    for field in fields(output):
        values = getattr(output, field.name)
        if values is not None:
            end = ends.get(field.name, atoms)
            parts[0][field.name], parts[1][field.name] = values[:end], values[end:]
    return replace(output, **parts[0]), replace(output, **parts[1])


def _rows(first: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows ``first`` to ``first + counts`` of every item, and their item."""
    owner = torch.repeat_interleave(
        torch.arange(len(counts), device=counts.device), counts
    )
    start = counts.cumsum(0) - counts
    within = torch.arange(len(owner), device=counts.device) - start[owner]
    return first[owner] + within, owner


def _edge_kinds(batch: Data) -> list[str]:
    """Return the prefixes of the edges of a batch: its own and those of side graphs."""
    side = [
        key.removesuffix(_OFFSETS) for key in batch.to_dict() if key.endswith(_OFFSETS)
    ]
    known = [name for name in side if name + _INDEX in batch and name != "teacher"]
    return ["", *(f"{name}_" for name in known)]


def _append_edges(
    found: Data, batch: Data, prefix: str, graphs: Tensor, moved_by: Tensor
) -> None:
    """Append the edges of ``graphs``, whose atoms have numbers ``moved_by`` higher."""
    index = batch[f"{prefix}edge_index"]
    offsets = batch[f"{prefix}cell_offsets"]
    of_edge = batch.batch[index[1]]
    counts = torch.bincount(of_edge, minlength=batch.num_graphs)
    first = counts.cumsum(0) - counts
    rows, owner = _rows(first[graphs], counts[graphs])
    copied = index[:, rows] + moved_by[owner]
    found[f"{prefix}edge_index"] = torch.cat((index, copied), dim=1)
    found[f"{prefix}cell_offsets"] = torch.cat((offsets, offsets[rows]))
