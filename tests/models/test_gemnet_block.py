"""An interaction block against loops over all triplets and quadruplets."""

import numpy as np
import pytest
import torch

from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import neighbor_edges
from pipeline.models.gemnet.geometry import edge_geometry
from pipeline.models.gemnet.tables import make_tables
from pipeline.models.zoo import build_model
from tests.models.conftest import structure_of
from tests.models.naive_gemnet import NaiveBlock, edges_of

SIZES = (
    *("emb_size_trip_in", "emb_size_trip_out", "emb_size_quad_in"),
    *("emb_size_quad_out", "emb_size_aint_in", "emb_size_aint_out"),
    *("emb_size_rbf", "emb_size_cbf", "emb_size_sbf", "num_radial", "emb_size_atom"),
)


def random_model(seed):
    """A model of one block, its inner sizes drawn and all different."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    sizes = rng.permutation(np.arange(3, 3 + len(SIZES))).tolist()
    hyperparameters = dict(zip(SIZES, sizes, strict=True))
    width = hyperparameters["emb_size_atom"] if seed == 0 else 15
    counts = ("before_skip", "after_skip", "concat", "atom", "atom_emb_layers")
    hyperparameters |= {f"num_{name}": int(rng.integers(1, 3)) for name in counts}
    model = build_model(
        "gemnet_oc",
        {
            **hyperparameters,
            "emb_size_edge": width,
            "num_spherical": int(rng.integers(2, 5)),
            "num_blocks": 1,
            "cutoff": 4.0,
            "cutoff_qint": 3.1,
            "cutoff_aeaint": 3.6,
            "cutoff_aint": 4.4,
            "max_neighbors": 8,
            "max_neighbors_qint": 3,
            "max_neighbors_aeaint": 5,
            "max_neighbors_aint": 30,
            "qint_tags": [1],
            **dict.fromkeys(INTERACTIONS, True),
        },
    ).double()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("scale_factor"):
                value.uniform_(0.5, 1.5)
    return model


INTERACTIONS = (
    "quad_interaction",
    "atom_edge_interaction",
    "edge_atom_interaction",
    "atom_interaction",
)


def cluster():
    positions = [
        [0.0, 0.1, 0.0],
        [1.4, 0.0, 0.3],
        [2.1, 1.3, -0.2],
        [0.2, 1.6, 1.1],
        [3.3, 0.6, 1.9],
    ]
    return structure_of(positions, [6, 8, 1, 7, 1], tags=[0, 1, 0, 0, 1])


def crystal():
    cell = [[2.9, 0.1, 0.0], [0.3, 3.2, 0.1], [0.0, 0.2, 3.5]]
    positions = [[0.0, 0.0, 0.0], [1.3, 1.7, 1.9]]
    return structure_of(positions, [11, 17], cell, [True] * 3, [0, 1])


@pytest.mark.parametrize("make_structure", [cluster, crystal])
@pytest.mark.parametrize("seed", [0, 1])
def test_block_equals_loops_over_all_paths(make_structure, seed):
    model, structure = random_model(seed), make_structure()
    edges = neighbor_edges(structure, model.graph_rule)
    batch = collate([structure], [edges], torch.float64)
    rng = np.random.default_rng(seed + 5)
    h = rng.normal(size=(len(structure), model.options.emb_size_atom))
    m = rng.normal(size=(len(edges), model.options.emb_size_edge))
    with torch.no_grad():
        tables = make_tables(batch, model.options)
        geometry = edge_geometry(batch, batch.positions)
        radial = model.radial_basis(geometry.distance)
        bases = model.make_bases(batch, batch.positions, tables, geometry, radial)
        states = torch.from_numpy(h.copy()), torch.from_numpy(m.copy())
        actual = model.int_blocks[0](*states, bases)
    graphs = [edges_of(structure, e) for e in (edges, *edges.extra_graphs.values())]
    assert list(edges.extra_graphs) == ["ae", "quad", "aa"]
    assert int(tables.quads.quad_mask.sum()) > 10
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    expected = NaiveBlock(state, model.options, *graphs)(h, m)
    for mine, naive in zip(actual, expected, strict=True):
        np.testing.assert_allclose(mine.numpy(), naive, rtol=0, atol=1e-10)
