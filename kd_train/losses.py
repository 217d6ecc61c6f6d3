"""Energy and force terms on normalised labels; missing labels are masked out."""

import torch
from torch import Tensor
from torch_geometric.data import Data

from kd_train.config import LossConfig
from pipeline.models.normalizer import Normalizer
from pipeline.models.output import ModelOutput


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


def output_loss(
    output: ModelOutput,
    batch: Data,
    energy: Tensor,
    forces: Tensor,
    normalizer: Normalizer,
    weights: LossConfig,
) -> Tensor:
    """α_E·MAE(E) + α_F·mean‖ΔF‖₂ against ``energy`` (B,) in eV, ``forces`` in eV/Å.

    The one form that L0, its validation and the paper's Eq. 7 share; labels are brought
    to the network's units first.
    """
    target = normalizer.normalize_energy(energy, batch.atomic_numbers, batch.batch)
    assert output.forces is not None
    return weights.energy_weight * energy_mae(
        output.energy, target.to(output.energy.dtype)
    ) + weights.force_weight * force_l2(
        output.forces, normalizer.normalize_forces(forces), batch.fixed
    )
