"""How much memory a structure takes in one pass, to size batches beforehand."""

import numpy as np

from pipeline.graphs.neighbors import Edges
from pipeline.models.gemnet.options import GemNetOCOptions

_FLOAT = 4
# States of the size of m that are alive at once within a block, beside the outputs of
# all blocks so far; gradients keep nearly everything.
_STATES = 6
_WITH_GRADIENTS = 5


def estimate_memory(options: GemNetOCOptions, edges: Edges, n_atoms: int) -> int:
    """Bytes that a structure adds to the peak; padding by its most crowded atom."""
    o = options
    degree = _largest_degree(edges, n_atoms)
    count, spherical = len(edges), o.num_spherical
    per_edge = o.emb_size_edge * (_STATES + (o.num_blocks + 1) * o.direct_forces)
    per_edge += 2 * o.num_radial + spherical * (3 * o.emb_size_cbf + o.emb_size_trip_in)
    floats = count * per_edge + 2 * n_atoms * degree**2 * spherical
    if "ae" in edges.extra_graphs:
        mixed = _largest_degree(edges.extra_graphs["ae"], n_atoms)
        floats += 3 * n_atoms * degree * mixed * spherical
        floats += len(edges.extra_graphs["ae"]) * (
            o.num_radial + 2 * o.emb_size_cbf * spherical
        )
    if "quad" in edges.extra_graphs:
        middle = len(edges.extra_graphs["quad"])
        floats += middle * degree**2 * (2 * spherical + 1)
        floats += 3 * middle * degree * spherical * o.emb_size_quad_in
        floats += count * spherical**2 * (o.emb_size_sbf + 2 * o.emb_size_quad_in)
    if "aa" in edges.extra_graphs:
        floats += len(edges.extra_graphs["aa"]) * (12 + o.emb_size_rbf)
        floats += n_atoms**2 * (o.emb_size_rbf + o.emb_size_aint_in)
    return _FLOAT * floats * (1 if o.direct_forces else _WITH_GRADIENTS)


def _largest_degree(edges: Edges, n_atoms: int) -> int:
    return int(np.bincount(edges.edge_index[1], minlength=n_atoms).max(initial=0))
