"""Metrics and predictions of a model, or of the stored teacher, on a split."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from kd_train.config import LossConfig
from kd_train.joined import Split
from kd_train.losses import output_loss
from kd_train.metrics import MetricSums
from kd_train.order import ordered_batches
from kd_train.prefetch import moved
from pipeline.fields import FIELDS
from pipeline.models.normalizer import Normalizer


@dataclass(frozen=True)
class Evaluation:
    """Metrics, the supervised loss L0, and predictions in eV and eV/Å."""

    metrics: dict[str, float]
    loss: float
    predictions: dict[str, npt.NDArray[Any]]


def evaluate(
    model: nn.Module,
    batches: Iterable[Data],
    normalizer: Normalizer,
    weights: LossConfig,
    device: torch.device,
) -> Evaluation:
    """Run ``model`` over ``batches``, leaving its mode as it was.

    Predictions come in the order of the batches, with ``n_atoms`` of every sample. The
    loss is the mean of those of batches, weighted by samples.
    """
    was_training = model.training
    model.eval()
    sums = MetricSums()
    kept: dict[str, list[Tensor]] = {}
    total, seen = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            batch = moved(batch, device)
            output = model(batch)
            loss = output_loss(
                output, batch, batch.energy, batch.forces, normalizer, weights
            )
            total += float(loss) * batch.num_graphs
            seen += batch.num_graphs
            energy = normalizer.denormalize_energy(
                output.energy, batch.atomic_numbers, batch.batch
            )
            forces = normalizer.denormalize_forces(output.forces)
            sums.add(
                energy, forces, batch.energy, batch.forces, batch.batch, batch.fixed
            )
            results = {
                "energy": energy,
                "forces": forces,
                "energy_label": batch.energy,
                "forces_label": batch.forces,
                "fixed": batch.fixed,
                "n_atoms": batch.natoms,
            }
            for name, tensor in results.items():
                kept.setdefault(name, []).append(tensor.detach().cpu())
    model.train(was_training)
    predictions = {name: torch.cat(parts).numpy() for name, parts in kept.items()}
    return Evaluation(sums.result(), total / max(seen, 1), predictions)


def teacher_metrics(split: Split) -> dict[str, float] | None:
    """Metrics of the stored teacher predictions; None where the store has none."""
    names = ("teacher_energy", "teacher_forces", "energy", "forces", "fixed")
    paths = {name: FIELDS[name].path for name in names}
    if paths["teacher_energy"] not in split.arrays:
        return None
    sums = MetricSums()
    for positions in ordered_batches(len(split), 1024):
        arrays = split.read(positions, tuple(paths.values()))
        values = {name: torch.from_numpy(arrays[path]) for name, path in paths.items()}
        batch = np.repeat(np.arange(len(positions)), split.n_atoms[positions])
        sums.add(
            values["teacher_energy"],
            values["teacher_forces"],
            values["energy"],
            values["forces"],
            torch.from_numpy(batch),
            values["fixed"].bool(),
        )
    return sums.result()
