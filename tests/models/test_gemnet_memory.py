"""Predicted memory of a pass against what a pass takes."""

import itertools
import json

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import neighbor_edges
from pipeline.models.zoo import PRESETS, build_model
from tests.models.conftest import VARIANTS, structure_of

_, DEMO = PRESETS["gemnet-oc-demo"]


def block_of_atoms(*sides):
    """A rattled piece of a simple cubic crystal, its first layer untagged."""
    grid = np.array(list(itertools.product(*map(range, sides))), float)
    noise = np.random.default_rng(1).uniform(-0.2, 0.2, grid.shape)
    tags = np.where(grid[:, 0] == 0, 0, 1)
    return structure_of(2.4 * grid + noise, [29] * len(grid), tags=tags)


def predicted(model, structures):
    edges = [neighbor_edges(s, model.graph_rule) for s in structures]
    return sum(
        model.estimate_memory(own, len(s))
        for own, s in zip(edges, structures, strict=True)
    )


def measured(model, structures, folder):
    """Largest number of bytes that tensors of one pass held at a time."""
    edges = [neighbor_edges(s, model.graph_rule) for s in structures]
    batch = collate(structures, edges)
    with torch.no_grad():
        model(batch)  # what is made once and kept is no part of the pass
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True
        ) as profiler:
            model(batch)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]"
    ]
    sizes = np.cumsum([size for _, size in sorted(changes)])
    return int(sizes.max())


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_prediction_is_right_within_a_factor_of_two(tmp_path, count, direct):
    torch.manual_seed(0)
    hyperparameters = {**DEMO, "num_blocks": 2, "direct_forces": direct}
    model = build_model("gemnet_oc", hyperparameters).eval()
    structures = [block_of_atoms(3, 3, 2)] * count
    ratio = predicted(model, structures) / measured(model, structures, tmp_path)
    assert 0.5 < ratio < 2


def test_more_atoms_take_more_and_a_batch_their_sum():
    model = build_model(*VARIANTS["gemnet_oc"])
    structures = [block_of_atoms(2, 2, n) for n in range(1, 6)]
    single = [predicted(model, [s]) for s in structures]
    assert single == sorted(single)
    assert len(set(single)) == 5
    assert predicted(model, structures) == sum(single)


def test_every_interaction_width_and_gradient_takes_more():
    name, hyperparameters = VARIANTS["gemnet_oc-triplets"]
    structure = block_of_atoms(3, 2, 2)

    def need(**change):
        model = build_model(name, {**hyperparameters, **change})
        return predicted(model, [structure])

    least = need()
    for change in (
        {"atom_interaction": True},
        {"atom_edge_interaction": True},
        {"quad_interaction": True},
        {"emb_size_edge": 24},
        {"num_blocks": 3},
        {"num_spherical": 5},
        {"direct_forces": False},
    ):
        assert need(**change) > least, change
