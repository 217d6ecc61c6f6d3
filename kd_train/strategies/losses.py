"""Losses as sums and counts, so that batches and processes add up exactly.

A term is a weighted sum of parts and every part a mean, ``total / count``. Counts
follow from the batch alone, so a step's counts are known before its first gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch_geometric.data import Data

from kd_train.config.sections import LossConfig
from pipeline.models.normalizer import Normalizer
from pipeline.models.output import ModelOutput


class Term(Protocol):
    """One term of the loss in P parts."""

    @property
    def name(self) -> str:
        """Column of its values in ``metrics.csv``."""

    @property
    def part_weights(self) -> tuple[float, ...]:
        """Weight of every part inside the term."""

    def counts(self, batch: Data) -> Tensor:
        """Return the divisors of the totals of ``batch``, (P,) float64."""

    def totals(self, output: ModelOutput, batch: Data) -> Tensor:
        """Return the summed errors of ``batch`` with their gradient, (P,) float32."""


def joint_mean(weights: Sequence[float], totals: Tensor, counts: Tensor) -> Tensor:
    """Sum weight · total / count over the parts, as a scalar of the totals' dtype.

    Zero, with a zero gradient, for a part that counts nothing. With the counts of a
    whole step, the values of its batches add up to that of the joint batch.
    """
    means = totals / torch.where(counts > 0, counts, 1).to(totals.dtype)
    # Term by term, because weights in a tensor would have to be copied to the device.
    weighted = [
        weight * mean for weight, mean in zip(weights, means.unbind(), strict=True)
    ]
    return torch.stack(weighted).sum()


@dataclass(frozen=True)
class Labels:
    """Targets of a batch with a weight each, which is 0 for missing labels.

    ``energy`` (B,) float64 in eV, ``forces`` (N, 3) float32 in eV/Å, ``energy_weight``
    (B,) and ``force_weight`` (N,) float32. Fixed atoms have no force weight.
    ``virial`` (B, 3, 3) float64 in eV with ``virial_weight`` (B,) float32, both None
    if no split of the run has virials.
    """

    energy: Tensor
    forces: Tensor
    energy_weight: Tensor
    force_weight: Tensor
    virial: Tensor | None = None
    virial_weight: Tensor | None = None


def reference_labels(batch: Data) -> Labels:
    """Return the dataset's labels, with weight 1 if a label exists."""
    return _known(batch.energy, batch.forces, batch.fixed, batch.get("virial"))


def teacher_labels(batch: Data) -> Labels:
    """Return the teacher's labels, with weight 1 if a label exists."""
    return _known(
        batch.teacher_energy,
        batch.teacher_forces,
        batch.fixed,
        batch.get("teacher_virial"),
    )


def complete_labels(batch: Data, weight: float) -> Labels:
    """Fill missing labels of the dataset with pseudo-labels of weight ``weight``.

    Energies and virials are completed by sample, forces by atom.
    """
    own, other = reference_labels(batch), teacher_labels(batch)
    has_energy = own.energy.isfinite()
    has_forces = own.forces.isfinite().all(dim=1)
    return Labels(
        torch.where(has_energy, own.energy, other.energy),
        torch.where(has_forces[:, None], own.forces, other.forces),
        torch.where(has_energy, own.energy_weight, weight * other.energy_weight),
        torch.where(has_forces, own.force_weight, weight * other.force_weight),
        *_complete_virial(own, other, weight),
    )


def _complete_virial(
    own: Labels, other: Labels, weight: float
) -> tuple[Tensor | None, Tensor | None]:
    """Virials and weights of ``own``, and of ``other`` where ``own`` has none."""
    if other.virial is None or other.virial_weight is None:
        return own.virial, own.virial_weight
    if own.virial is None or own.virial_weight is None:
        return other.virial, weight * other.virial_weight
    known = own.virial_weight > 0
    return (
        torch.where(known[:, None, None], own.virial, other.virial),
        torch.where(known, own.virial_weight, weight * other.virial_weight),
    )


def _known(
    energy: Tensor, forces: Tensor, fixed: Tensor, virial: Tensor | None
) -> Labels:
    usable = ~fixed & forces.isfinite().all(dim=1)
    known = None if virial is None else virial.isfinite().all(dim=2).all(dim=1).float()
    return Labels(
        energy, forces, energy.isfinite().float(), usable.float(), virial, known
    )


class OutputError:
    """α_E·mean|ΔE| + α_F·force error + α_W·mean‖ΔW‖/N: L0, its validation and Eq. 7.

    ``labels`` takes targets and weights from a batch; errors are weighted means in the
    network's units. The force error is the mean of ‖ΔF‖₂, or with ``force_loss: mae``
    that of the components' |ΔF|. The part of virials, a mean of Frobenius norms per
    atom in the scale of energies, is there only if its weight is not 0.
    """

    def __init__(
        self,
        name: str,
        labels: Callable[[Data], Labels],
        normalizer: Normalizer,
        config: LossConfig,
    ) -> None:
        self.name = name
        self.part_weights: tuple[float, ...]
        self.part_weights = (config.energy_weight, config.force_weight)
        self._has_virial = bool(config.virial_weight)
        if config.virial_weight:
            self.part_weights += (config.virial_weight,)
        self._labels = labels
        self._normalizer = normalizer
        by_length = config.force_loss == "l2"
        self._force_total = force_l2_total if by_length else force_mae_total
        self._errors_per_atom = 1 if by_length else 3

    def counts(self, batch: Data) -> Tensor:
        """Return the summed weights of the errors of every part, shape (P,)."""
        labels = self._labels(batch)
        energies = labels.energy_weight.double().sum()
        atoms = labels.force_weight.double().sum()
        found = [energies, self._errors_per_atom * atoms]
        if self._has_virial:
            weight = labels.virial_weight
            found.append(
                torch.zeros_like(energies) if weight is None else weight.double().sum()
            )
        return torch.stack(found)

    def totals(self, output: ModelOutput, batch: Data) -> Tensor:
        """Return the weighted sums of the errors of every part, shape (P,)."""
        labels = self._labels(batch)
        energy = self._normalizer.normalize_energy(
            labels.energy, batch.atomic_numbers, batch.batch
        )
        forces = self._normalizer.normalize_forces(labels.forces)
        assert output.forces is not None
        found = [
            energy_total(
                output.energy, energy.to(output.energy.dtype), labels.energy_weight
            ),
            self._force_total(output.forces, forces, labels.force_weight),
        ]
        if self._has_virial:
            found.append(self._virial_total(output, labels, batch))
        return torch.stack(found)

    def _virial_total(self, output: ModelOutput, labels: Labels, batch: Data) -> Tensor:
        if labels.virial is None or labels.virial_weight is None:
            return torch.zeros_like(output.energy.sum())
        assert output.virial is not None
        label = (labels.virial / self._normalizer.energy_std).to(output.virial.dtype)
        per_atom = labels.virial_weight / batch.natoms
        return virial_total(output.virial, label, per_atom)


def energy_total(prediction: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Return Σ w·|ΔE| over samples of (B,) tensors.

    Labels without weight may be NaN.
    """
    error = (prediction - label).abs()
    return (weight * torch.where(weight > 0, error, 0)).sum()


def force_l2_total(prediction: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Return Σ w·‖ΔF‖₂ over atoms of (N, 3) tensors, with ``weight`` (N,).

    Labels without weight may be NaN.
    """
    # A masked atom must not send NaN through the norm's gradient.
    difference = torch.where(weight[:, None] > 0, prediction - label, 1.0)
    norm = torch.linalg.vector_norm(difference, dim=1)
    return (weight * torch.where(weight > 0, norm, 0)).sum()


def virial_total(prediction: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Return Σ w·‖ΔW‖, of Frobenius norms, over samples of (B, 3, 3) tensors.

    Labels without ``weight`` (B,) may be NaN.
    """
    rows = prediction.flatten(1), label.flatten(1)
    return force_l2_total(*rows, weight)


def force_mae_total(prediction: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Return Σ w·|ΔF| over components of (N, 3) tensors, with ``weight`` (N,)."""
    error = (prediction - label).abs()
    return (weight[:, None] * torch.where(weight[:, None] > 0, error, 0)).sum()
