"""The optimiser of student and adapters."""

import torch
from torch import nn

from kd_train.config import OptimizerConfig


def make_optimizer(modules: nn.Module, options: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all trainable parameters of ``modules``."""
    return torch.optim.AdamW(
        [p for p in modules.parameters() if p.requires_grad],
        lr=options.lr,
        weight_decay=options.weight_decay,
        amsgrad=options.amsgrad,
        eps=options.eps,
        fused=True,
    )
