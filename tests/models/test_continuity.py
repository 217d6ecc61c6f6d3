"""Energies of a liquid along small steps: what students for dynamics must obey."""

import dataclasses

import numpy as np
import pytest
import torch
from ase.build import molecule

from pipeline.models.derivatives import predict_gradients
from pipeline.models.zoo import PRESETS, build_model
from tests.models.conftest import structure_of

TINY = {
    "painn": {"hidden_channels": 12, "num_layers": 2, "num_rbf": 12},
    "schnet": {
        "hidden_channels": 12,
        "num_filters": 12,
        "num_interactions": 2,
        "num_gaussians": 12,
    },
}
MD = {"painn": PRESETS["painn-small-md"][1], "schnet": PRESETS["schnet-md"][1]}
# Root mean square of a step of one coordinate, in Å, and the largest energy that a step
# may gain or lose beyond the work of the forces, in eV.
STEP, LARGEST = 5e-4, 1e-5


@pytest.fixture(scope="module")
def liquid():
    """A periodic box of 27 ethanol molecules at the density of a liquid."""
    rng = np.random.default_rng(0)
    side = (243 / 0.092) ** (1 / 3)
    ethanol = molecule("CH3CH2OH")
    ethanol.positions -= ethanol.get_center_of_mass()
    positions = []
    for place in np.ndindex(3, 3, 3):
        turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        positions.append(ethanol.positions @ turn + np.array(place) * side / 3)
    numbers = np.tile(ethanol.numbers, 27)
    cell = side * np.eye(3)
    return structure_of(np.concatenate(positions), numbers, cell, [True] * 3)


def make_network(name, **hyperparameters):
    """Network of random weights and biases, in double precision."""
    torch.manual_seed(5)
    network = build_model(name, hyperparameters).double()
    with torch.no_grad():
        for value in network.parameters():
            if value.ndim == 1:
                value.add_(0.1 * torch.randn_like(value))
    return network.eval()


def worst_step(network, liquid, batch_of, steps):
    """Largest difference of energy and work of one step, in eV.

    The forces of both ends give the work.
    """
    rng = np.random.default_rng(1)

    def evaluate(positions):
        moved = dataclasses.replace(liquid, positions=positions)
        with torch.no_grad():
            output = predict_gradients(network, batch_of([moved], network.graph_rule))
        return output.energy.item(), output.forces.numpy()

    positions, worst = liquid.positions, 0.0
    energy, forces = evaluate(positions)
    for _ in range(steps):
        move = rng.normal(scale=STEP, size=positions.shape)
        positions = positions + move
        new_energy, new_forces = evaluate(positions)
        work = -np.sum((forces + new_forces) / 2 * move)
        worst = max(worst, abs(new_energy - energy - work))
        energy, forces = new_energy, new_forces
    return worst


def reordered(liquid, seed=3):
    """The same box with its atoms in another order."""
    order = np.random.default_rng(seed).permutation(len(liquid))
    return dataclasses.replace(
        liquid,
        positions=liquid.positions[order],
        atomic_numbers=liquid.atomic_numbers[order],
    )


def spread(network, liquid, batch_of):
    """How much energies differ between two orders of the atoms, in eV."""
    both = [batch_of([s], network.graph_rule) for s in (liquid, reordered(liquid))]
    with torch.no_grad():
        first, second = (network.predict_energies(batch).energy for batch in both)
    return abs(first - second).item()


@pytest.mark.parametrize("name", MD)
def test_energies_of_md_presets_follow_their_forces(name, liquid, batch_of):
    network = make_network(name, **MD[name] | TINY[name])
    batch = batch_of([liquid], network.graph_rule)
    assert batch.edge_index.shape[1] > 40 * 243
    assert worst_step(network, liquid, batch_of, 60) < LARGEST
    assert spread(network, liquid, batch_of) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", MD)
def test_energies_follow_forces_for_a_thousand_steps(name, liquid, batch_of):
    network = make_network(name, **MD[name] | TINY[name])
    assert worst_step(network, liquid, batch_of, 1000) < LARGEST


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("painn", {"max_neighbors": 40}),
        ("painn", {"smooth": False}),
        ("schnet", {"max_neighbors": 40}),
    ],
)
def test_limits_and_biases_break_energies(name, change, liquid, batch_of):
    """So the tests above can fail: each of these was the rule once."""
    network = make_network(name, **MD[name] | TINY[name] | change)
    assert worst_step(network, liquid, batch_of, 15) > 10 * LARGEST


def test_a_limit_makes_energies_depend_on_the_order_of_atoms(liquid, batch_of):
    network = make_network(
        "painn", **MD["painn"] | TINY["painn"] | {"max_neighbors": 40}
    )
    assert spread(network, liquid, batch_of) > 1e-3


def test_messages_of_smooth_networks_end_at_the_cutoff(batch_of):
    for smooth in (True, False):
        network = make_network(
            "painn", **MD["painn"] | TINY["painn"] | {"smooth": smooth}
        )
        energies = []
        for distance in (4.999999, 5.000001):
            pair = structure_of([[0, 0, 0], [distance, 0, 0]], [6, 8])
            batch = batch_of([pair], network.graph_rule)
            with torch.no_grad():
                energies.append(network.predict_energies(batch).energy.item())
        assert (abs(energies[0] - energies[1]) < 1e-12) == smooth
