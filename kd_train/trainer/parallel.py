"""Gradients that several processes average, by torch's data parallelism."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def average_gradients(module: nn.Module) -> nn.Module:
    """Wrap ``module`` so that a backward pass averages gradients over processes."""
    # Buffers are constants, so no process sends them. The option changed its name.
    known = inspect.signature(DistributedDataParallel).parameters
    new = "forward_sync_buffers"
    options: dict[str, Any] = {new if new in known else "broadcast_buffers": False}
    return DistributedDataParallel(module, **options)


def keep_gradients(module: nn.Module, kept: bool) -> AbstractContextManager[None]:
    """Return the context of a batch whose gradients are not exchanged yet if ``kept``.

    Gradients of accumulated batches add up in each process. The last batch of a step
    exchanges their sum.
    """
    if kept and isinstance(module, DistributedDataParallel):
        context: AbstractContextManager[None] = module.no_sync()
        return context
    return nullcontext()
