"""GemNet-OC against outputs, states and graphs of the original implementation."""

import json

import numpy as np
import pytest
import torch

from pipeline.graphs.neighbors import neighbor_edges
from pipeline.models.checkpoint import load_checkpoint
from pipeline.models.gemnet.tables import make_tables
from pipeline.models.zoo import build_model, known_hyperparameters
from tests.models.references import (
    GRAPHS,
    assert_close,
    batch_for,
    edge_rows,
    order_of,
    predict,
    structures_in,
)

NAMES = ("gemnet_oc_tiny", "gemnet_oc_grad", "gemnet_oc_base")
# Sums over all entries cancel, so they are compared in units of what is summed.
SUM_TOLERANCE = 1e-10


@pytest.fixture(params=NAMES, scope="module")
def name(request):
    return request.param


@pytest.fixture(scope="module")
def reference(parity_folder, name):
    return np.load(parity_folder / f"{name}.io.npz")


@pytest.fixture(scope="module")
def structures(reference):
    return list(structures_in(reference))


@pytest.fixture(scope="module")
def loaded(parity_folder, name):
    return load_checkpoint(parity_folder / f"{name}.ckpt.pt")


@pytest.fixture
def model(loaded):
    return loaded.model


def sorted_both(batch, reference):
    """Orders that bring our edges and those of the file into one sequence."""
    index = reference["graph/main/edge_index"]
    theirs = edge_rows(index, -reference["graph/main/cell_offset"])
    mine = edge_rows(batch.edge_index, batch.cell_offsets)
    orders = order_of(mine), order_of(theirs)
    np.testing.assert_array_equal(mine[orders[0]], theirs[orders[1]])
    return orders


@pytest.mark.parametrize(
    ("precision", "dtype", "energies", "others"),
    [("f64", torch.float64, 1e-9, 1e-9), ("f32", torch.float32, 1e-4, 5e-4)],
)
def test_outputs_and_features(
    model, reference, structures, precision, dtype, energies, others
):
    output, batch = predict(model, structures, dtype)
    assert_close(output.energy, reference[f"{precision}/energy"], energies)
    per_atom = reference[f"{precision}/energy_atom"]
    assert_close(output.per_atom_energy, per_atom, energies)
    assert_close(output.forces, reference[f"{precision}/forces"], others)
    assert_close(output.node_features, reference[f"{precision}/x_E"], others)
    if not model.direct:
        assert output.edge_features is None
        return
    mine, theirs = sorted_both(batch, reference)
    features = reference[f"{precision}/x_F"]
    assert_close(output.edge_features[mine], features[theirs], others)
    sums = reference[f"{precision}/x_F_to_node"]
    assert_close(output.edge_to_node_features, sums, others)
    # The file has u from the source to the target, the features the opposite.
    vectors = -reference[f"{precision}/x_F_to_vec"]
    assert_close(output.vector_features, vectors, others)


def test_states_between_blocks(model, reference, structures):
    count = model.options.num_blocks
    for k in range(count):
        layers = {"node_features": f"regular_{k + 1}"}
        output, _ = predict(model, structures, torch.float64, layers)
        assert_close(output.node_features, reference[f"f64/h_block{k}"], 1e-9)
    last = dict.fromkeys(("node_features", "edge_features"), f"regular_{count}")
    output, batch = predict(model, structures, torch.float64, last)
    mine, theirs = sorted_both(batch, reference)
    assert_close(output.node_features, reference["f64/h"], 1e-9)
    assert_close(output.edge_features[mine], reference["f64/m"][theirs], 1e-9)


def assert_sums(values, expected):
    """Sum and sum of squares of an array, which no order changes."""
    total, squares, _ = expected
    assert values.square().sum().item() == pytest.approx(squares, rel=1e-9)
    # The largest sum that these squares allow.
    scale = np.sqrt(squares * values.numel())
    assert values.sum().item() == pytest.approx(total, abs=SUM_TOLERANCE * scale)


def test_every_output_block_and_edge_state(model, reference, structures):
    blocks = range(model.options.num_blocks + 1)
    for k in blocks:
        layers = dict.fromkeys(("node_features", "edge_features"), f"X_{k}")
        output, _ = predict(model, structures, torch.float64, layers)
        assert_sums(output.node_features, reference[f"debug/out{k}_x_E"])
        if model.direct:
            assert_sums(output.edge_features, reference[f"debug/out{k}_x_F"])
        layers = {"edge_features": f"regular_{k}"}
        output, _ = predict(model, structures, torch.float64, layers)
        key = f"m_block{k - 1}" if k else "m_embed"
        assert_sums(output.edge_features, reference[f"debug/{key}"])


def test_physical_units(loaded, reference, structures):
    output, batch = predict(loaded.model, structures, torch.float64)
    energy = loaded.normalizer.denormalize_energy(
        output.energy, batch.atomic_numbers, batch.batch
    )
    assert_close(energy, reference["phys/energy"], 1e-9)
    forces = loaded.normalizer.denormalize_forces(output.forces)
    assert_close(forces, reference["phys/forces"], 1e-9)


def test_batch_against_one_at_a_time(model, reference, structures):
    together, _ = predict(model, structures, torch.float64)
    apart = [predict(model, [s], torch.float64)[0] for s in structures]
    for field in ("energy", "forces", "node_features"):
        joined = torch.cat([getattr(output, field) for output in apart])
        assert_close(joined, getattr(together, field).numpy(), 1e-11)


def test_edges_of_every_graph(model, reference, structures):
    batch = batch_for(model, structures, torch.float64)
    for theirs, mine in GRAPHS.items():
        if f"graph/{theirs}/edge_index" not in reference.files:
            continue
        prefix = f"{mine}_" if mine else ""
        actual = edge_rows(batch[f"{prefix}edge_index"], batch[f"{prefix}cell_offsets"])
        expected = edge_rows(
            reference[f"graph/{theirs}/edge_index"],
            -reference[f"graph/{theirs}/cell_offset"],
        )
        np.testing.assert_array_equal(
            actual[order_of(actual)], expected[order_of(expected)]
        )
    if "graph/a2a/neighbours_per_atom" in reference.files:
        degree = np.bincount(batch.aa_edge_index[1], minlength=batch.num_nodes)
        expected = reference["graph/a2a/neighbours_per_atom"]
        np.testing.assert_array_equal(degree, expected)


def test_partners_and_counts(model, reference, structures):
    batch = batch_for(model, structures, torch.float64)
    tables = make_tables(batch, model.options)
    mine, theirs = sorted_both(batch, reference)
    # Both say which edge is the mirror of which; compare by position after sorting.
    place, other_place = np.argsort(mine), np.argsort(theirs)
    swap = tables.swap.numpy()[mine]
    expected = reference["graph/main/id_swap"][theirs]
    np.testing.assert_array_equal(place[swap], other_place[expected])
    counts = {"triplets_e2e": tables.edge_edge}
    if tables.edge_atom is not None:
        counts |= dict.fromkeys(("triplets_a2e", "triplets_e2a"), tables.edge_atom)
    if tables.quads is not None:
        quads = tables.quads
        counts |= {
            "quad_triplets_out": quads.out_mask,
            "quad_triplets_in": quads.in_mask,
        }
        counts["quadruplets"] = quads.quad_mask
    given = {k for k in reference.files if k.startswith("count/")}
    assert {f"count/{key}" for key in counts} == given
    for key, mask in counts.items():
        assert int(mask.sum()) == int(reference[f"count/{key}"]), key


@pytest.mark.parametrize("crystal", ["fcc_cubic", "ideal_slab"])
def test_limits_that_are_not_strict(parity_folder, crystal):
    reference = np.load(parity_folder / "graph_nonstrict.npz")
    attributes = json.loads(str(reference["meta"]))["attributes"]
    rule = build_model(
        "gemnet_oc", known_hyperparameters("gemnet_oc", attributes)
    ).graph_rule
    (structure,) = structures_in(reference, f"{crystal}/")
    edges = neighbor_edges(structure, rule)
    for theirs, mine in GRAPHS.items():
        graph = edges.extra_graphs[mine] if mine else edges
        actual = edge_rows(graph.edge_index, graph.cell_offsets)
        expected = edge_rows(
            reference[f"{crystal}/{theirs}/edge_index"],
            -reference[f"{crystal}/{theirs}/cell_offset"],
        )
        np.testing.assert_array_equal(
            actual[order_of(actual)], expected[order_of(expected)]
        )
    degree = np.bincount(edges.extra_graphs["aa"].edge_index[1])
    expected = reference[f"{crystal}/a2a/neighbours_per_atom"]
    np.testing.assert_array_equal(degree, expected)
