"""Metrics and predictions of a model, or of the stored teacher, on a split."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from kd_train.joined import Split
from kd_train.losses import Term, joint_mean
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
    term: Term,
    device: torch.device,
) -> Evaluation:
    """Run ``model`` over ``batches``, leaving its mode as it was.

    Predictions come in the order of the batches, with ``n_atoms`` of every sample. The
    loss is that of ``term`` over all samples at once, whatever the batches.
    """
    was_training = model.training
    model.eval()
    sums = MetricSums()
    kept: dict[str, list[Tensor]] = {}
    parts = torch.zeros(2, len(term.part_weights), dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            batch = moved(batch, device)
            output = model(batch)
            parts[0] += term.totals(output, batch).double().cpu()
            parts[1] += term.counts(batch).cpu()
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
    return Evaluation(
        sums.result(), float(joint_mean(term.part_weights, *parts)), predictions
    )


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
