"""Scale factors that are fitted to data: no product changes the variance."""

import dataclasses

import numpy as np
import pytest
import torch

from pipeline.models.gemnet.fitting import fit_scale_factors
from pipeline.models.gemnet.layers import Scale
from pipeline.models.zoo import build_model
from tests.models.conftest import VARIANTS


@pytest.fixture
def model():
    """A fresh model of all interactions, every factor one."""
    torch.manual_seed(4)
    return build_model(*VARIANTS["gemnet_oc"]).double()


def variances(model, batch):
    """Variance of every factor's result and of its reference, by name."""
    found = {}

    def keep(name):
        def hook(_, inputs, output):
            spreads = (x.var(dim=0).mean().item() for x in (output, inputs[1]))
            found[name] = tuple(spreads)

        return hook

    scales = {n: m for n, m in model.named_modules() if isinstance(m, Scale)}
    handles = [m.register_forward_hook(keep(n)) for n, m in scales.items()]
    # With gradients nothing is overwritten, so that the hooks see what there was.
    model(batch)
    for handle in handles:
        handle.remove()
    assert found.keys() == scales.keys()
    return found


def test_every_product_has_the_variance_of_its_reference(model, molecules, batch_of):
    batch = batch_of(molecules, model.graph_rule)
    before = variances(model, batch)
    assert max(abs(found / wanted - 1) for found, wanted in before.values()) > 0.5
    factors = fit_scale_factors(model, batch)
    for name, (found, wanted) in variances(model, batch).items():
        assert found == pytest.approx(wanted, rel=1e-9), name
    assert len(factors) == 2 * 11 + 3 * 2
    for name, value in factors.items():
        module = model.get_submodule(name)
        assert module.scale_factor.item() == value
        assert value > 0
        assert not module.scale_factor.requires_grad


def test_a_second_fit_changes_nothing(model, molecules, batch_of):
    batch = batch_of(molecules, model.graph_rule)
    first = fit_scale_factors(model, batch)
    second = fit_scale_factors(model, batch)
    assert second == pytest.approx(first, rel=1e-9)
    hooks = [m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks)


def test_factors_of_any_start_end_alike(model, molecules, batch_of):
    batch = batch_of(molecules, model.graph_rule)
    expected = fit_scale_factors(model, batch)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("scale_factor"):
                value.fill_(7.0)
    model.fit(batch)
    assert fit_scale_factors(model, batch) == pytest.approx(expected, rel=1e-9)


def test_factors_without_an_example_stay(model, molecules, atom, batch_of):
    bare = dataclasses.replace(molecules[0], tags=np.zeros(6, np.int8))
    factors = fit_scale_factors(model, batch_of([bare], model.graph_rule))
    quads = {name for name in factors if ".quad_interaction." in name}
    assert len(quads) == 6
    assert all(factors[name] == 1 for name in quads)
    assert all(factors[name] != 1 for name in factors.keys() - quads)
    torch.manual_seed(4)
    fresh = build_model(*VARIANTS["gemnet_oc"]).double()
    factors = fit_scale_factors(fresh, batch_of([atom], fresh.graph_rule))
    assert set(factors.values()) == {1.0}


def test_weights_are_left_alone(model, molecules, batch_of):
    before = {n: p.clone() for n, p in model.named_parameters()}
    fit_scale_factors(model, batch_of(molecules, model.graph_rule))
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) != name.endswith("scale_factor"), name
