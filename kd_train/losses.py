"""Energy and force terms on normalised labels; missing labels are masked out."""

import torch
from torch import Tensor


def energy_mae(prediction: Tensor, label: Tensor) -> Tensor:
    """Mean |ΔE| over the samples that have a label; (B,) tensors, scalar result."""
    error = (prediction - label).abs()
    known = label.isfinite()
    return torch.where(known, error, 0).sum() / known.sum().clamp(min=1)


def force_l2(prediction: Tensor, label: Tensor, fixed: Tensor) -> Tensor:
    """Mean ‖ΔF‖₂ over free atoms that have a label; (N, 3) tensors, ``fixed`` (N,)."""
    usable = ~fixed & label.isfinite().all(dim=1)
    # A masked atom must not send NaN through the norm's gradient.
    difference = torch.where(usable[:, None], prediction - label, 1.0)
    norm = torch.linalg.vector_norm(difference, dim=1)
    return torch.where(usable, norm, 0).sum() / usable.sum().clamp(min=1)
