"""Forces and virials against finite differences and symmetries, for every network."""

import dataclasses

import numpy as np
import pytest
import torch

from pipeline.errors import SpecError
from pipeline.graphs.neighbors import NeighborSpec
from pipeline.models.derivatives import predict_gradients
from pipeline.models.network import Network
from pipeline.models.normalizer import Normalizer
from pipeline.models.output import ModelOutput
from pipeline.models.schnet import SchNet
from pipeline.models.zoo import build_model
from tests.models.conftest import DIRECT, VARIANTS, structure_of

GRADIENT = [name for name in VARIANTS if name not in DIRECT]
# Of the central difference over four points.
STEP = 3e-4
STENCIL = {-2: 1 / 12, -1: -8 / 12, 1: 8 / 12, 2: -1 / 12}


@pytest.fixture
def structures():
    """A molecule and a skew periodic cell."""
    rng = np.random.default_rng(8)
    grid = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    cell = [[3.9, 0.0, 0.3], [1.1, 4.1, 0.0], [-0.8, 0.6, 4.3]]
    molecule = 1.5 * grid[:5] + rng.uniform(-0.2, 0.2, (5, 3))
    inside = (grid[:6] / 2) @ np.array(cell) + rng.uniform(-0.2, 0.2, (6, 3))
    return [
        structure_of(molecule, [6, 1, 8, 1, 7]),
        structure_of(inside, [14, 8, 6, 1, 14, 8], cell, [True] * 3),
    ]


def slope(model, batch, move):
    """Derivative of all energies (B,) by a step of ``move(batch, step)``."""
    total = 0.0
    for steps, weight in STENCIL.items():
        moved = batch.clone()
        move(moved, steps * STEP)
        with torch.no_grad():
            total = total + weight * model.predict_energies(moved).energy
    return total / STEP


def strain(batch, step, row, column):
    """Strain positions and cells of ``batch`` in place, symmetrically."""
    change = torch.zeros(3, 3, dtype=torch.float64)
    change[row, column] += step / 2
    change[column, row] += step / 2
    matrix = torch.eye(3, dtype=torch.float64) + change
    batch.positions = batch.positions @ matrix
    batch.cell = batch.cell @ matrix


def test_forces_are_minus_the_slope_of_the_energy(
    make_model, variant, structures, batch_of
):
    model = make_model(variant)
    batch = batch_of(structures, model.graph_rule)
    forces = predict_gradients(model, batch).forces
    assert forces.abs().max() > 1e-3
    for atom, axis in [(0, 0), (3, 1), (4, 2), (6, 0), (8, 1), (10, 2)]:

        def move(moved, step, atom=atom, axis=axis):
            moved.positions[atom, axis] += step

        expected = -slope(model, batch, move).sum().item()
        assert forces[atom, axis].item() == pytest.approx(expected, abs=1e-7)


def test_virials_are_minus_the_slope_by_strain(
    make_model, variant, structures, batch_of
):
    model = make_model(variant)
    batch = batch_of(structures, model.graph_rule)
    virial = predict_gradients(model, batch).virial
    assert virial.shape == (2, 3, 3)
    assert virial.abs().amax(dim=(1, 2)).min() > 1e-3
    assert torch.equal(virial, virial.mT)
    for row, column in [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]:

        def move(moved, step, row=row, column=column):
            strain(moved, step, row, column)

        expected = -slope(model, batch, move)
        torch.testing.assert_close(virial[:, row, column], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("variant", GRADIENT, indirect=True)
def test_networks_with_gradient_forces_give_them_themselves(
    make_model, variant, structures, batch_of
):
    model = make_model(variant)
    batch = batch_of(structures, model.graph_rule)
    own, derived = model(batch), predict_gradients(model, batch)
    assert torch.equal(own.forces, derived.forces)
    assert torch.equal(own.virial, derived.virial)
    assert not own.virial.requires_grad
    assert not batch.positions.requires_grad
    assert not batch.cell.requires_grad


@pytest.mark.parametrize("variant", DIRECT, indirect=True)
def test_direct_forces_come_without_a_virial(make_model, variant, structures, batch_of):
    model = make_model(variant)
    batch = batch_of(structures, model.graph_rule)
    direct, derived = model(batch), predict_gradients(model, batch)
    assert direct.virial is None
    torch.testing.assert_close(derived.energy, direct.energy)
    assert (derived.forces - direct.forces).abs().max() > 1e-3


def test_no_grad_gives_the_same_numbers(make_model, variant, structures, batch_of):
    for training in (False, True):
        model = make_model(variant).train(training)
        batch = batch_of(structures, model.graph_rule)
        tracked = predict_gradients(model, batch)
        with torch.no_grad():
            output = predict_gradients(model, batch)
        assert tracked.virial.requires_grad == training
        for field in dataclasses.fields(ModelOutput):
            value = getattr(output, field.name)
            if value is not None:
                torch.testing.assert_close(
                    *(value, getattr(tracked, field.name).detach()),
                    rtol=1e-10,
                    atol=1e-10,
                )
                assert not value.requires_grad


def test_virials_turn_with_the_structure(make_model, variant, structures, batch_of):
    model = make_model(variant)
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    turned = [
        dataclasses.replace(s, positions=s.positions @ turn, cell=s.cell @ turn)
        for s in structures
    ]
    matrix = torch.from_numpy(turn)
    expected = predict_gradients(model, batch_of(structures, model.graph_rule)).virial
    found = predict_gradients(model, batch_of(turned, model.graph_rule)).virial
    torch.testing.assert_close(
        found, matrix.mT @ expected @ matrix, rtol=1e-9, atol=1e-10
    )


def test_virials_do_not_depend_on_the_order_of_atoms(
    make_model, variant, structures, batch_of
):
    model = make_model(variant)
    rng = np.random.default_rng(2)
    orders = [rng.permutation(len(s)) for s in structures]
    renumbered = [
        dataclasses.replace(
            s,
            positions=s.positions[order],
            atomic_numbers=s.atomic_numbers[order],
            tags=s.tags[order],
        )
        for s, order in zip(structures, orders, strict=True)
    ]
    expected = predict_gradients(model, batch_of(structures, model.graph_rule)).virial
    found = predict_gradients(model, batch_of(renumbered, model.graph_rule)).virial
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_eight_cells_have_eight_times_energy_and_virial(
    make_model, variant, structures, batch_of
):
    model = make_model(variant)
    cell = structures[1]
    shifts = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    images = shifts @ cell.cell
    eight = structure_of(
        np.concatenate([cell.positions + image for image in images]),
        np.tile(cell.atomic_numbers, 8),
        2 * cell.cell,
        [True] * 3,
    )
    single = predict_gradients(model, batch_of([cell], model.graph_rule))
    found = predict_gradients(model, batch_of([eight], model.graph_rule))
    torch.testing.assert_close(found.energy, 8 * single.energy)
    torch.testing.assert_close(found.virial, 8 * single.virial)
    torch.testing.assert_close(found.forces, single.forces.repeat(8, 1))


def test_atoms_without_neighbours_have_no_virial(make_model, variant, atom, batch_of):
    model = make_model(variant)
    output = predict_gradients(model, batch_of([atom], model.graph_rule))
    assert output.virial.tolist() == [[[0.0] * 3] * 3]
    assert output.forces.tolist() == [[0.0] * 3]


@pytest.mark.parametrize("variant", GRADIENT, indirect=True)
def test_losses_of_virials_can_be_differentiated(
    make_model, variant, structures, batch_of
):
    model = make_model(variant).train()
    batch = batch_of(structures, model.graph_rule)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    direction = {
        n: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for n, p in trained.items()
    }

    def loss(step):
        moved = {n: p + step * direction[n] for n, p in trained.items()}
        output = torch.func.functional_call(model, moved, (batch,))
        return output.virial.square().sum()

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss(step).backward()
    measured = (loss(1e-6).item() - loss(-1e-6).item()) / 2e-6
    assert abs(measured) > 1e-3
    assert step.grad.item() == pytest.approx(measured, rel=1e-5)


def test_virials_become_eV_by_the_scale_of_the_energy():
    normalizer = Normalizer(energy_mean=7.0, energy_std=2.5, force_std=3.0)
    virial = torch.ones(2, 3, 3)
    assert torch.equal(normalizer.denormalize_virial(virial), 2.5 * virial)


class Shifted(SchNet):
    """A plug-in that changes the energy of the forward pass alone."""

    def forward(self, batch, layers=None):
        output = super().forward(batch, layers)
        return dataclasses.replace(output, energy=output.energy + 1)


class Better(Shifted):
    """The same, where gradients see the change."""

    def predict_energies(self, batch, layers=None):
        output = super().predict_energies(batch, layers)
        return dataclasses.replace(output, energy=output.energy + 1)


@pytest.mark.parametrize("network", [Network, Shifted])
def test_networks_whose_energy_gradients_would_not_see_are_refused(
    network, structures, batch_of
):
    batch = batch_of(structures, NeighborSpec(4.0, 50, symmetric=False))
    with pytest.raises(SpecError, match=f"{network.__name__} defines forward without"):
        predict_gradients(network(), batch)


def test_a_network_that_changes_its_energies_is_followed(structures, batch_of):
    network = Better(**VARIANTS["schnet"][1]).double()
    batch = batch_of(structures, network.graph_rule)
    found = predict_gradients(network, batch)
    torch.testing.assert_close(found.energy + 1, network(batch).energy)


def test_energies_keep_their_bits(structures, batch_of):
    torch.manual_seed(0)
    model = build_model("schnet", VARIANTS["schnet"][1])
    batch = batch_of(structures, model.graph_rule, torch.float32)
    assert torch.equal(model(batch).energy, model.predict_energies(batch).energy)
