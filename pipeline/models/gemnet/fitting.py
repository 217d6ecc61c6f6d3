"""Sets the scale factors of a fresh network so that no layer changes the variance."""

import math

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from pipeline.models.gemnet.layers import Scale


def fit_scale_factors(model: nn.Module, batch: Data) -> dict[str, float]:
    """Fit every factor of ``model`` on one ``batch``; returns them by module name.

    A factor makes the variance (over rows, averaged over channels) of its product that
    of its reference, as the factors of the released models were made. One pass fits
    all, since each is set before its product goes on. What a batch has no example of
    keeps its factor.
    """
    factors = {n: m for n, m in model.named_modules() if isinstance(m, Scale)}
    handles = [m.register_forward_pre_hook(_fit) for m in factors.values()]
    try:
        with torch.no_grad():
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: float(module.scale_factor) for name, module in factors.items()}


def _fit(module: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
    product, reference = inputs
    if min(len(product), len(reference)) < 2:
        return
    wanted = float(reference.detach().var(dim=0).mean())
    found = float(product.detach().var(dim=0).mean())
    if wanted > 0 and found > 0:
        assert isinstance(module, Scale)
        module.scale_factor.data.fill_(math.sqrt(wanted / found))
