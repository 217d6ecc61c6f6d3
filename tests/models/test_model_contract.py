"""What every model must obey, whatever its weights."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from pipeline.models.zoo import build_model
from tests.models.conftest import DIRECT, VARIANTS

FIELDS = (
    "energy",
    "forces",
    "per_atom_energy",
    "node_features",
    "vector_features",
    "edge_to_node_features",
)
GRADIENT = [name for name in VARIANTS if name not in DIRECT]


def assert_same(actual, expected, tolerance=1e-10):
    for name in FIELDS:
        left, right = getattr(actual, name), getattr(expected, name)
        assert (left is None) == (right is None), name
        if left is not None:
            torch.testing.assert_close(
                left, right, rtol=tolerance, atol=tolerance, msg=name
            )


def rotation():
    """A proper rotation that no lattice shares."""
    matrix, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    return matrix * np.sign(np.linalg.det(matrix))


def test_rotation_turns_vectors_and_nothing_else(
    make_model, variant, molecules, batch_of
):
    model, turn = make_model(variant), rotation()
    turned = [
        dataclasses.replace(s, positions=s.positions @ turn, cell=s.cell @ turn)
        for s in molecules
    ]
    expected = model(batch_of(molecules, model.graph_rule))
    matrix = torch.from_numpy(turn)
    expected.forces = expected.forces @ matrix
    if expected.vector_features is not None:
        expected.vector_features = torch.einsum(
            "nxc,xy->nyc", expected.vector_features, matrix
        )
    assert_same(model(batch_of(turned, model.graph_rule)), expected, 1e-8)


def test_reflection_turns_vectors_and_nothing_else(
    make_model, variant, molecules, batch_of
):
    model = make_model(variant)
    mirrored = [
        dataclasses.replace(s, positions=-s.positions, cell=-s.cell) for s in molecules
    ]
    expected = model(batch_of(molecules, model.graph_rule))
    expected.forces = -expected.forces
    if expected.vector_features is not None:
        expected.vector_features = -expected.vector_features
    assert_same(model(batch_of(mirrored, model.graph_rule)), expected, 1e-8)


def test_moving_a_structure_or_an_atom_by_a_lattice_vector_changes_nothing(
    make_model, variant, molecules, batch_of
):
    model = make_model(variant)
    moved = []
    for structure in molecules:
        positions = structure.positions + np.array([11.3, -4.2, 7.7])
        if structure.pbc.any():
            positions[1] += 2 * structure.cell[0] - structure.cell[1]
        moved.append(dataclasses.replace(structure, positions=positions))
    expected = model(batch_of(molecules, model.graph_rule))
    assert_same(model(batch_of(moved, model.graph_rule)), expected, 1e-8)


def test_renumbering_atoms_renumbers_the_output(
    make_model, variant, molecules, batch_of
):
    model = make_model(variant)
    for structure in molecules:
        order = np.random.default_rng(2).permutation(len(structure))
        renumbered = dataclasses.replace(
            structure,
            positions=structure.positions[order],
            atomic_numbers=structure.atomic_numbers[order],
            tags=structure.tags[order],
        )
        expected = model(batch_of([structure], model.graph_rule))
        for name in FIELDS[1:]:
            if getattr(expected, name) is not None:
                setattr(expected, name, getattr(expected, name)[order])
        assert_same(model(batch_of([renumbered], model.graph_rule)), expected)


def test_batch_equals_one_at_a_time(make_model, variant, molecules, atom, batch_of):
    model = make_model(variant)
    structures = [molecules[0], atom, *molecules[1:]]
    together = model(batch_of(structures, model.graph_rule))
    singles = [model(batch_of([s], model.graph_rule)) for s in structures]
    for name in FIELDS:
        if getattr(together, name) is not None:
            joined = torch.cat([getattr(single, name) for single in singles])
            torch.testing.assert_close(getattr(together, name), joined)


def test_energy_is_the_sum_over_atoms(make_model, variant, molecules, batch_of):
    model = make_model(variant)
    batch = batch_of(molecules, model.graph_rule)
    output = model(batch)
    for index in range(3):
        own = output.per_atom_energy[batch.batch == index]
        torch.testing.assert_close(output.energy[index], own.sum())


@pytest.mark.parametrize("variant", GRADIENT, indirect=True)
def test_forces_are_minus_the_slope_of_the_energy(
    make_model, variant, molecules, batch_of
):
    model = make_model(variant)
    batch = batch_of(molecules, model.graph_rule)
    forces = model(batch).forces
    assert forces.abs().max() > 1e-3
    step = 1e-5
    for atom, axis in [(0, 0), (3, 1), (7, 2), (9, 0), (12, 1)]:
        energies = []
        for sign in (1, -1):
            shifted = batch.clone()
            shifted.positions[atom, axis] += sign * step
            energies.append(model(shifted).energy.sum().item())
        slope = (energies[0] - energies[1]) / (2 * step)
        assert forces[atom, axis].item() == pytest.approx(-slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("training", [False, True])
def test_atoms_without_neighbours_are_finite_with_gradients(
    make_model, variant, atom, molecules, batch_of, training
):
    model = make_model(variant).train(training)
    for structures in ([atom], [atom, atom, molecules[0]]):
        output = model(batch_of(structures, model.graph_rule))
        total = sum(
            getattr(output, name).square().sum()
            for name in FIELDS
            if getattr(output, name) is not None
        )
        if training or variant in DIRECT:
            model.zero_grad()
            total.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            assert len(gradients) > 5
            assert all(gradient.isfinite().all() for gradient in gradients)
        assert total.isfinite()
        assert output.forces[0].tolist() == [0, 0, 0]


def test_no_grad_gives_the_same_numbers_without_a_graph(
    make_model, variant, molecules, batch_of
):
    for training in (False, True):
        model = make_model(variant).train(training)
        batch = batch_of(molecules, model.graph_rule)
        expected = model(batch)
        with torch.no_grad():
            output = model(batch)
        assert_same(output, expected)
        assert not output.energy.requires_grad
        assert not output.forces.requires_grad
        assert not batch.positions.requires_grad


def test_training_on_forces_reaches_every_weight(
    make_model, variant, molecules, batch_of
):
    model = make_model(variant).train()
    output = model(batch_of(molecules, model.graph_rule))
    (output.forces.square().sum() + output.energy.square().sum()).backward()
    for name, parameter in model.named_parameters():
        if name.endswith("scale_factor"):
            assert parameter.grad is None
        else:
            assert parameter.grad.abs().sum() > 0, name


def test_force_loss_has_the_gradient_of_finite_differences(
    make_model, variant, molecules, batch_of
):
    model = make_model(variant).train()
    batch = batch_of(molecules, model.graph_rule)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    direction = {
        n: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for n, p in trained.items()
    }

    def loss(step):
        moved = {n: p + step * direction[n] for n, p in trained.items()}
        output = torch.func.functional_call(model, moved, (batch,))
        return output.forces.square().sum()

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss(step).backward()
    measured = (loss(1e-6).item() - loss(-1e-6).item()) / 2e-6
    assert abs(measured) > 1e-3
    assert step.grad.item() == pytest.approx(measured, rel=1e-5)


def test_hyperparameters_rebuild_the_model(make_model, variant):
    model = make_model(variant)
    written = json.loads(json.dumps(model.hyperparameters))
    name = variant.split("-")[0]
    twin = build_model(name, written)
    twin.load_state_dict(model.state_dict())
    assert twin.hyperparameters == model.hyperparameters
    assert twin.graph_rule == model.graph_rule


def test_forces_can_be_left_out(variant, molecules, batch_of):
    name, hyperparameters = VARIANTS[variant]
    model = build_model(name, {**hyperparameters, "regress_forces": False})
    batch = batch_of(molecules, model.graph_rule, torch.float32)
    assert model(batch).forces is None


def test_widths_name_the_features(make_model, variant, molecules, batch_of):
    model = make_model(variant)
    output = model(batch_of(molecules, model.graph_rule))
    for name, width in model.widths.items():
        assert getattr(output, name).shape[-1] == width
    hidden = (*FIELDS[3:], "edge_features")
    given = {n for n in hidden if getattr(output, n) is not None}
    assert given == set(model.widths)


def test_graph_rule_follows_the_hyperparameters(variant, make_model):
    model = make_model(variant)
    assert model.graph_rule.cutoff == 4.0
    assert model.graph_rule.max_neighbors == 50
    assert model.graph_rule.symmetric == (variant != "schnet")


def test_node_states_are_those_of_one_pass_for_every_layer(
    make_model, variant, molecules, batch_of
):
    model = make_model(variant)
    batch = batch_of(molecules, model.graph_rule)
    with torch.no_grad():
        states = model.node_states(batch)
        assert set(states) == set(model.layers)
        for layer, found in states.items():
            expected = model(batch, {"node_features": layer}).node_features
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        final = model(batch).node_features
    # In order of depth, so the last is where features are distilled by default.
    torch.testing.assert_close(list(states.values())[-1], final)
