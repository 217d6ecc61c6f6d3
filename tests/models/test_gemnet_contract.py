"""What GemNet-OC must obey beside the contract of all models."""

import dataclasses

import numpy as np
import pytest
import torch

from pipeline.graphs.neighbors import neighbor_edges
from pipeline.models.gemnet.tables import make_tables
from pipeline.models.zoo import build_model
from tests.models.conftest import VARIANTS, structure_of
from tests.models.references import edge_rows, order_of

ALL = "gemnet_oc"
GEMNETS = [name for name in VARIANTS if name.startswith(ALL)]
FIELDS = ("energy", "forces", "per_atom_energy", "node_features", "edge_features")


@pytest.fixture(params=GEMNETS)
def variant(request):
    return request.param


def values_of(output):
    found = {name: getattr(output, name) for name in FIELDS}
    return {name: value for name, value in found.items() if value is not None}


def edge_states(model, batch, layer="regular_1"):
    return model(batch, {"edge_features": layer}).edge_features


def test_renumbering_atoms_renumbers_the_edge_features(
    make_model, variant, molecules, batch_of
):
    model = make_model(variant)
    for structure in molecules:
        order = np.random.default_rng(2).permutation(len(structure))
        names = ("positions", "atomic_numbers", "tags")
        renumbered = dataclasses.replace(
            structure, **{name: getattr(structure, name)[order] for name in names}
        )
        before = batch_of([structure], model.graph_rule)
        after = batch_of([renumbered], model.graph_rule)
        # Atom k after was order[k] before; bring both into the numbers of before.
        rows = edge_rows(before.edge_index, before.cell_offsets)
        others = edge_rows(order[after.edge_index], after.cell_offsets)
        first, second = order_of(rows), order_of(others)
        np.testing.assert_array_equal(rows[first], others[second])
        torch.testing.assert_close(
            edge_states(model, before)[first], edge_states(model, after)[second]
        )


def test_turning_and_mirroring_keeps_the_edge_features(
    make_model, variant, molecules, batch_of
):
    model = make_model(variant)
    matrix, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    expected = edge_states(model, batch_of(molecules, model.graph_rule))
    for turn in (matrix, -matrix):
        turned = [
            dataclasses.replace(s, positions=s.positions @ turn, cell=s.cell @ turn)
            for s in molecules
        ]
        states = edge_states(model, batch_of(turned, model.graph_rule))
        torch.testing.assert_close(states, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("layer", ["concatmlp", "X_1", "regular_0", "regular_2"])
def test_sums_over_edges_end_in_their_targets(make_model, molecules, batch_of, layer):
    model = make_model(ALL)
    batch = batch_of(molecules, model.graph_rule)
    fields = ("edge_features", "edge_to_node_features", "vector_features")
    with torch.no_grad():
        output = model(batch, dict.fromkeys(fields, layer))
    width = output.edge_features.shape[1]
    sums = np.zeros((batch.num_nodes, width))
    vectors = np.zeros((batch.num_nodes, 3, width))
    positions, cells = batch.positions.numpy(), batch.cell.numpy()
    for number, (source, target) in enumerate(batch.edge_index.T.tolist()):
        cell = cells[batch.batch[target]]
        image = positions[source] + batch.cell_offsets[number].numpy() @ cell
        vector = image - positions[target]
        state = output.edge_features[number].numpy()
        sums[target] += state
        vectors[target] += np.outer(vector / np.linalg.norm(vector), state)
    np.testing.assert_allclose(output.edge_to_node_features, sums, atol=1e-10)
    np.testing.assert_allclose(output.vector_features, vectors, atol=1e-10)


def test_layers_are_chosen_field_by_field(make_model, variant, molecules, batch_of):
    model = make_model(variant)
    batch = batch_of(molecules, model.graph_rule)
    fields = ("node_features", "edge_features", "vector_features")
    with torch.no_grad():
        expected = model(batch)
        outputs = [model(batch, dict.fromkeys(fields, name)) for name in model.layers]
    for layer, output in zip(model.layers, outputs, strict=True):
        for field in fields:
            width, value = model.layer_width(field, layer), getattr(output, field)
            assert (value is None) == (width is None)
            assert value is None or value.shape[-1] == width
        torch.testing.assert_close(output.energy, expected.energy)
    seen = [output.node_features for output in outputs]
    for index, value in enumerate(seen):
        assert not any(torch.equal(value, other) for other in seen[:index])
    assert model.layers[0] == "concatmlp"
    torch.testing.assert_close(seen[0], expected.node_features)
    mixed = model(batch, {"node_features": "X_1", "edge_features": "regular_1"})
    torch.testing.assert_close(mixed.node_features, seen[model.layers.index("X_1")])
    edges = outputs[model.layers.index("regular_1")].edge_features
    torch.testing.assert_close(mixed.edge_features, edges)
    assert model.layer_width("node_features", "regular_9") is None


def quadruplets(model, structures, batch_of):
    """Number of paths; None without any middle edge."""
    batch = batch_of(structures, model.graph_rule)
    quads = make_tables(batch, model.options).quads
    return None if quads is None else int(quads.quad_mask.sum())


@pytest.fixture
def without_quadruplets(molecules):
    """No middle edge; no path; no path because only two atoms are there."""
    bare = dataclasses.replace(molecules[0], tags=np.zeros(6, np.int8))
    # One middle edge in each direction, and nothing else at its ends.
    pair = structure_of([[0, 0, 0], [0.9, 0.5, 0.2]], [8, 1])
    line = structure_of(
        [[0, 0, 0], [1.1, 0.2, 0], [1.9, 0.9, 0.4]], [8, 6, 1], tags=[0]
    )
    return [bare, pair, line]


@pytest.mark.parametrize("variant", GEMNETS[:2], indirect=True)
def test_structures_without_quadruplets(
    make_model, variant, molecules, without_quadruplets, batch_of
):
    model = make_model(variant)
    counts = [quadruplets(model, [s], batch_of) for s in without_quadruplets]
    assert counts == [None, 0, None]
    assert quadruplets(model, [molecules[0]], batch_of) > 0
    structures = [without_quadruplets[0], molecules[0], *without_quadruplets[1:]]
    together = model(batch_of(structures, model.graph_rule))
    apart = [model(batch_of([s], model.graph_rule)) for s in structures]
    for name, value in values_of(together).items():
        joined = torch.cat([getattr(output, name) for output in apart])
        torch.testing.assert_close(value, joined, msg=name)
        assert value.isfinite().all()
    # Quadruplets matter where there are some, so their absence is no accident.
    assert (together.energy[0] - together.energy[1]).abs() > 1e-6


def test_an_interaction_without_paths_counts_as_zero(make_model, molecules, batch_of):
    """Leaving it out instead would change what messages are divided by."""
    model = make_model(ALL)
    bare = dataclasses.replace(molecules[0], tags=np.zeros(6, np.int8))
    empty = model(batch_of([bare], model.graph_rule))
    silent = make_model(ALL)
    for block in silent.int_blocks:
        torch.nn.init.zeros_(block.quad_interaction.up_projection_ca.linear.weight)
        torch.nn.init.zeros_(block.quad_interaction.up_projection_ac.linear.weight)
    zeroed = silent(batch_of([molecules[0]], model.graph_rule))
    for name, value in values_of(empty).items():
        torch.testing.assert_close(value, getattr(zeroed, name), msg=name)


def test_atom_far_from_all_others(make_model, variant, molecules, atom, batch_of):
    model = make_model(variant)
    near = molecules[0]
    far = structure_of(
        np.vstack((near.positions[:2], [[0, 60.0, 0]], near.positions[2:])),
        np.insert(near.atomic_numbers, 2, 8),
    )
    output = model(batch_of([far], model.graph_rule))
    rest = [0, 1, 3, 4, 5, 6]
    expected = model(batch_of([near], model.graph_rule))
    torch.testing.assert_close(output.node_features[rest], expected.node_features)
    torch.testing.assert_close(output.forces[rest], expected.forces)
    lonely = model(batch_of([atom], model.graph_rule))
    torch.testing.assert_close(output.node_features[2:3], lonely.node_features)
    assert output.forces[2].tolist() == [0, 0, 0]


@pytest.mark.parametrize("images_as_middle", [False, True])
def test_crystal_of_one_atom_equals_its_supercell(
    make_model, batch_of, images_as_middle
):
    hyperparameters = dict(VARIANTS[ALL][1])
    if images_as_middle:
        hyperparameters["cutoff_qint"] = 3.4
    model = build_model("gemnet_oc", hyperparameters).double()
    model.load_state_dict(make_model(ALL).state_dict())
    cell = np.array([[3.1, 0.2, 0.0], [0.1, 3.2, 0.3], [0.0, 0.4, 3.3]])
    position = np.array([[0.3, 0.1, 0.2]])
    small = structure_of(position, [29], cell, [True] * 3)
    double = structure_of(
        np.vstack((position, position + cell[1])),
        [29, 29],
        cell * np.array([[1], [2], [1]]),
        [True] * 3,
    )
    assert (quadruplets(model, [small], batch_of) is not None) == images_as_middle
    one = model(batch_of([small], model.graph_rule))
    two = model(batch_of([double], model.graph_rule))
    # Opposite images see each other at a straight angle, where the dihedral angle is
    # undefined and rounding shows.
    tolerance = 1e-5 if images_as_middle else 1e-10
    torch.testing.assert_close(
        two.per_atom_energy,
        one.per_atom_energy.expand(2),
        rtol=tolerance,
        atol=tolerance,
    )
    torch.testing.assert_close(
        two.node_features, one.node_features.expand(2, -1), rtol=0, atol=tolerance
    )
    for output in (one, two):
        assert output.forces.abs().max() <= tolerance
    assert one.node_features.abs().max() > 1e-3


DIRECTIONS = {
    "exact": (1.0, 0.0, 0.0),
    "rounded": (0.48, -0.6, 0.64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_straight_angles_are_finite_with_all_gradients(
    make_model, variant, batch_of, direction, dtype
):
    """Chains of atoms, and images of atoms that lie opposite each other."""
    steps = np.array([0.0, 1.1, 2.3, 3.4, 4.7])
    chain = structure_of(np.outer(steps, DIRECTIONS[direction]) + 0.1, [1, 6, 6, 7, 8])
    cell = 2.8 * np.eye(3)
    atom = structure_of([[0.1, 0.2, 0.3]], [29], cell, [True] * 3)
    salt = structure_of([[0, 0, 0], [1.4, 1.4, 1.4]], [55, 17], cell, [True] * 3)
    model = make_model(variant).to(dtype).train()
    batch = batch_of([chain, atom, salt], model.graph_rule, dtype)
    if variant != "gemnet_oc-triplets":
        assert make_tables(batch, model.options).quads.quad_mask.any()
    output = model(batch)
    values = values_of(output)
    total = sum(value.square().mean() for value in values.values())
    total.backward()
    assert all(value.isfinite().all() for value in values.values())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) > 20
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_forces_of_both_directions_can_be_coupled(molecules, batch_of):
    """Then every pair of atoms pulls and pushes alike: no total force."""
    name, hyperparameters = VARIANTS[ALL]
    torch.manual_seed(1)
    free = build_model(name, hyperparameters).double()
    coupled = build_model(name, {**hyperparameters, "forces_coupled": True}).double()
    coupled.load_state_dict(free.state_dict())
    batch = batch_of(molecules, free.graph_rule)
    first, second = free(batch), coupled(batch)
    torch.testing.assert_close(first.energy, second.energy)
    assert first.forces[:6].sum(dim=0).abs().max() > 1e-4
    for index in range(3):
        total = second.forces[batch.batch == index].sum(dim=0)
        torch.testing.assert_close(total, torch.zeros_like(total))


def test_mean_over_atoms_instead_of_the_sum(molecules, batch_of):
    name, hyperparameters = VARIANTS["gemnet_oc-triplets"]
    model = build_model(name, {**hyperparameters, "extensive": False}).double()
    batch = batch_of(molecules, model.graph_rule)
    output = model(batch)
    for index in range(3):
        own = output.per_atom_energy[batch.batch == index]
        torch.testing.assert_close(output.energy[index], own.mean())


def test_edges_are_those_of_the_rule(make_model, molecules, batch_of):
    """Edge features are rows of the graph that is stored with them."""
    model = make_model(ALL)
    with torch.no_grad():
        output = model(batch_of(molecules, model.graph_rule))
    counts = [len(neighbor_edges(s, model.graph_rule)) for s in molecules]
    assert output.edge_features.shape == (sum(counts), model.options.emb_size_edge)
