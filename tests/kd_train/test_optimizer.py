"""Which parameters decay, and how gradients are clipped."""

import pytest
import torch
from torch import nn

from kd_train.config.sections import OptimizerConfig
from kd_train.trainer.optimizer import clip_gradients, make_optimizer, parameter_groups
from pipeline.models.zoo import build_model
from tests.stores import TINY_PAINN


def _modules() -> nn.ModuleDict:
    student = build_model("painn", TINY_PAINN)
    return nn.ModuleDict({"student": student, "adapters": nn.Linear(4, 3)})


@pytest.mark.parametrize("decayed", ["all", "matrices"])
def test_a_step_without_gradient_shrinks_only_what_decays(decayed: str) -> None:
    modules = _modules()
    options = OptimizerConfig.model_validate(
        {"lr": 0.1, "weight_decay": 0.5, "weight_decay_on": decayed}
    )
    before = {n: p.detach().clone() for n, p in modules.named_parameters()}
    for parameter in modules.parameters():
        parameter.grad = torch.zeros_like(parameter)
    make_optimizer(modules, options).step()
    for name, parameter in modules.named_parameters():
        spared = name.endswith("bias") or "embedding" in name or "norm" in name
        # AdamW: decay is separate from the gradient, a factor of 1 - lr * decay.
        decays = parameter.requires_grad and not (decayed == "matrices" and spared)
        factor = 0.95 if decays else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])
    assert any("embedding" in name for name in before)


def test_every_trainable_parameter_is_in_one_group() -> None:
    modules = _modules()
    next(modules.parameters()).requires_grad_(False)
    groups = parameter_groups(modules, OptimizerConfig(weight_decay_on="matrices"))
    found = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    expected = {id(p) for p in modules.parameters() if p.requires_grad}
    assert len(found) == len(expected)
    assert {id(p) for p in found} == expected


@pytest.mark.parametrize("limit", [0.1, 1e6])
def test_clipping_is_that_of_torch(limit: float) -> None:
    modules, other = _modules(), _modules()
    generator = torch.Generator().manual_seed(0)
    for ours, theirs in zip(modules.parameters(), other.parameters(), strict=True):
        ours.grad = torch.randn(ours.shape, generator=generator)
        theirs.grad = ours.grad.clone()
    next(modules.parameters()).grad = next(other.parameters()).grad = None
    clip_gradients(modules.parameters(), limit)
    torch.nn.utils.clip_grad_norm_(other.parameters(), limit)
    for ours, theirs in zip(modules.parameters(), other.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None and theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)
