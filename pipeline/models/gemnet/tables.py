"""Which edges meet in a batch: everything about its graphs but the geometry."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch_geometric.data import Data

from pipeline.models.gemnet.options import GemNetOCOptions
from pipeline.models.gemnet.slots import Slots, partners, shift_code


@dataclass(frozen=True)
class IndexedEdges:
    """Edges of one kind: ``image`` (E,) int64 names source atom and shift together."""

    source: Tensor
    target: Tensor
    shift: Tensor
    image: Tensor
    slots: Slots


@dataclass(frozen=True)
class QuadTables:
    """Middle edges (b -> a) of quadruplets with their outer edges.

    Output edges (c -> a) are the main edges ``out_edges`` (O,) in ``out_slots``, whose
    rows are the atoms a; input edges (d -> b) are ``in_edges`` (I,) in ``in_slots``
    with the atoms b as rows. ``middle`` arranges the Q middle edges by a; ``out_row``
    and ``in_row`` (Q,) are their rows. Masks are True where a path exists: ``out_mask``
    (Q, out width), ``in_mask`` (Q, in width), ``quad_mask`` (Q, out width, in width).
    """

    out_edges: Tensor
    in_edges: Tensor
    out_slots: Slots
    in_slots: Slots
    middle: Slots
    out_row: Tensor
    in_row: Tensor
    out_mask: Tensor
    in_mask: Tensor
    quad_mask: Tensor


@dataclass(frozen=True)
class Tables:
    """All index tables of a batch.

    ``swap`` (E,) is the mirror of every main edge; masks (N, slots, slots) are True
    where an output edge (second axis) meets an input edge (third axis).
    """

    main: IndexedEdges
    swap: Tensor
    edge_edge: Tensor
    ae: IndexedEdges | None
    edge_atom: Tensor | None
    quad: IndexedEdges | None
    quads: QuadTables | None


def make_tables(batch: Data, options: GemNetOCOptions) -> Tables:
    """Index tables of a collated batch; no gradients, no host loops over edges."""
    names = [""]
    if options.atom_edge_interaction or options.edge_atom_interaction:
        names.append("ae_")
    if options.quad_interaction:
        names.append("quad_")
    codes = shift_code([batch[f"{name}cell_offsets"] for name in names])
    count = batch.num_nodes
    # Images of different atoms must stay apart for any sum of up to three shifts.
    spread = 6 * max((int(c.abs().max()) for c in codes if c.numel()), default=0) + 1
    graphs = {
        name: _graph(batch[f"{name}edge_index"], code, count, spread)
        for name, code in zip(names, codes, strict=True)
    }
    main, ae, quad = graphs[""], graphs.get("ae_"), graphs.get("quad_")
    own = torch.eye(main.slots.width, dtype=torch.bool, device=main.source.device)
    filled = main.slots.filled
    return Tables(
        main=main,
        swap=partners(main.source, main.target, main.shift),
        edge_edge=filled[:, :, None] & filled[:, None] & ~own,
        ae=ae,
        edge_atom=None if ae is None else _match_edges(main, ae),
        quad=quad,
        quads=None if quad is None else _quads(main, quad, spread),
    )


def _graph(edge_index: Tensor, shift: Tensor, count: int, spread: int) -> IndexedEdges:
    source, target = edge_index
    return IndexedEdges(
        source, target, shift, source * spread + shift, Slots.of(target, count)
    )


def _match_edges(first: IndexedEdges, second: IndexedEdges) -> Tensor:
    """Pairs of edges into one atom from different images, (N, slots, slots)."""
    filled = first.slots.filled[:, :, None] & second.slots.filled[:, None]
    one = first.slots.pad(first.image)[:, :, None]
    other = second.slots.pad(second.image)[:, None]
    return filled & (one != other)


def _quads(main: IndexedEdges, quad: IndexedEdges, spread: int) -> QuadTables | None:
    """Tables of all quadruplets; None when the batch has no middle edge."""
    if not len(quad.source):
        return None
    out_edges, out_slots, out_row = _select_into(main, quad.target)
    in_edges, in_slots, in_row = _select_into(main, quad.source)
    rows = out_slots.count
    outer = out_slots.pad(main.image[out_edges])[out_row]  # (Q, O)
    # Image of d as seen from a: the shifts of both edges on the way add up.
    inner = in_slots.pad(main.image[in_edges])[in_row] + quad.shift[:, None]  # (Q, I)
    out_mask = out_slots.filled[out_row] & (outer != quad.image[:, None])
    start = (quad.target * spread)[:, None]
    in_mask = in_slots.filled[in_row] & (inner != start)
    quad_mask = (
        out_mask[:, :, None] & in_mask[:, None] & (outer[:, :, None] != inner[:, None])
    )
    return QuadTables(
        out_edges=out_edges,
        in_edges=in_edges,
        out_slots=out_slots,
        in_slots=in_slots,
        middle=Slots.of(out_row, rows),
        out_row=out_row,
        in_row=in_row,
        out_mask=out_mask,
        in_mask=in_mask,
        quad_mask=quad_mask,
    )


def _select_into(main: IndexedEdges, atoms: Tensor) -> tuple[Tensor, Slots, Tensor]:
    """Main edges into any of ``atoms``, their slots, and the row of every atom."""
    chosen, row = torch.unique(atoms, return_inverse=True)
    row_of = torch.full((main.slots.count,), -1, device=atoms.device)
    row_of[chosen] = torch.arange(len(chosen), device=atoms.device)
    row_of_edge = row_of[main.target]
    edges = torch.nonzero(row_of_edge >= 0).squeeze(1)
    return edges, Slots.of(row_of_edge[edges], len(chosen)), row
