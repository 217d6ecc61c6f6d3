"""The optimiser of student and adapters."""

from collections.abc import Iterable

import torch
from torch import nn

from kd_train.config.sections import OptimizerConfig


def make_optimizer(modules: nn.Module, options: OptimizerConfig) -> torch.optim.AdamW:
    """Make AdamW over all trainable parameters of ``modules``."""
    return torch.optim.AdamW(
        parameter_groups(modules, options),
        lr=options.lr,
        amsgrad=options.amsgrad,
        eps=options.eps,
        fused=True,
    )


def parameter_groups(
    modules: nn.Module, options: OptimizerConfig
) -> list[dict[str, object]]:
    """Group trainable parameters by their weight decay, each once.

    With ``weight_decay_on: matrices`` biases, scales of norms and embeddings are not
    decayed: all that has fewer than two axes, and the weights of ``nn.Embedding``.
    """
    trainable = [p for p in modules.parameters() if p.requires_grad]
    if options.weight_decay_on == "all":
        return [{"params": trainable, "weight_decay": options.weight_decay}]
    embeddings = {
        id(module.weight)
        for module in modules.modules()
        if isinstance(module, nn.Embedding)
    }
    spared = [p for p in trainable if p.ndim < 2 or id(p) in embeddings]
    kept = {id(p) for p in spared}
    matrices = [p for p in trainable if id(p) not in kept]
    return [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scale all gradients so that their joint norm is at most ``limit``.

    What torch's function computes, with fewer calls and without products by 1.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients)
    total = torch.linalg.vector_norm(torch.stack(norms))
    factor = (limit / (total + 1e-6)).clamp(max=1.0)
    # Reading the factor from a GPU would wait for it.
    if factor.device.type == "cpu" and factor == 1:
        return
    torch._foreach_mul_(gradients, factor)
