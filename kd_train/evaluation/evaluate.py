"""Metrics and predictions of a model, or of the stored teacher, on a split."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from kd_train.config.sections import LossConfig
from kd_train.distributed import ALONE, World, interleave
from kd_train.evaluation.metrics import SUMMED, MetricSums
from kd_train.loader.prefetch import move_to_device
from kd_train.loader.sampler import ordered_batches
from kd_train.loader.split import Split
from kd_train.strategies.losses import OutputError, joint_mean, reference_labels
from pipeline.fields import FIELDS
from pipeline.models.normalizer import Normalizer


@dataclass(frozen=True)
class Evaluation:
    """Metrics, the supervised loss L0, and predictions in eV and eV/Å.

    The loss is NaN if no sample has a label.
    """

    metrics: dict[str, float]
    loss: float
    predictions: dict[str, npt.NDArray[Any]]


def evaluate(
    model: nn.Module,
    batches: Iterable[Data],
    normalizer: Normalizer,
    weights: LossConfig,
    device: torch.device,
    world: World = ALONE,
) -> Evaluation:
    """Run ``model`` over ``batches``, leaving its mode as it was.

    Predictions come in the order of the batches, with ``n_atoms`` of every sample. The
    loss is L0 over all samples at once, whatever the batches. Of several processes each
    has every ``world.size``-th batch, from its rank on, and each gets the whole result:
    bit for bit that of one process, since the sums of batches are added in their order.
    """
    was_training = model.training
    model.eval()
    term = OutputError("l0", reference_labels, normalizer, weights)
    width = 2 + 2 * len(term.part_weights) + 2 * len(SUMMED)
    rows = [torch.zeros(0, width, dtype=torch.float64)]
    predictions = [_no_results()]
    with torch.no_grad():
        for batch in batches:
            batch = move_to_device(batch, device)
            output = model(batch)
            sums = MetricSums()
            results = _results(output, batch, normalizer)
            sums.add(
                results["energy"],
                results["forces"],
                batch.energy,
                batch.forces,
                batch.batch,
                batch.fixed,
            )
            sums.add_virials(
                results["virial"], results["virial_label"], results["volume"]
            )
            parts = [term.totals(output, batch).double(), term.counts(batch)]
            sizes = torch.tensor([batch.num_graphs, batch.num_nodes]).double()
            row = torch.cat([sizes, *(part.cpu() for part in parts), sums.row()])
            rows.append(row[None])
            predictions.append({name: value.cpu() for name, value in results.items()})
    model.train(was_training)
    joint = {
        name: torch.cat([part[name] for part in predictions]) for name in predictions[0]
    }
    return _gather_results(torch.cat(rows), joint, term.part_weights, world)


def _gather_results(
    rows: Tensor,
    results: dict[str, Tensor],
    part_weights: tuple[float, ...],
    world: World,
) -> Evaluation:
    """Join the rows (n, W) and results of all processes in the order of batches.

    A row has samples, atoms, totals and counts of the parts of the loss, then sums and
    counts of metrics.
    """
    count = len(part_weights)
    parts = world.all_gather(rows)
    sums = MetricSums()
    total = torch.zeros(2 * count, dtype=torch.float64)
    for row in interleave([list(part) for part in parts]):
        total = total + row[2 : 2 + 2 * count]
        sums.add_row(row[2 + 2 * count :])
    loss = float(joint_mean(part_weights, total[:count], total[count:]))
    predictions = {}
    for name, values in results.items():
        column = 1 if name in _PER_ATOM else 0
        pieces = [
            list(torch.split(value, part[:, column].long().tolist()))
            for value, part in zip(world.all_gather(values), parts, strict=True)
        ]
        predictions[name] = torch.cat([values[:0], *interleave(pieces)]).numpy()
    if not np.isfinite(predictions["virial_label"]).any():
        for name in _OF_VIRIALS:
            del predictions[name]
    known = bool(total[count:].any())
    return Evaluation(sums.result(), loss if known else float("nan"), predictions)


_PER_ATOM = ("forces", "forces_label", "fixed")
# Predictions that are there only if samples have virials.
_OF_VIRIALS = ("virial", "virial_label", "volume")


def _results(output: Any, batch: Data, normalizer: Normalizer) -> dict[str, Tensor]:
    """Return the arrays of ``predictions.npz`` for a batch, on its device."""
    return {
        "energy": normalizer.denormalize_energy(
            output.energy, batch.atomic_numbers, batch.batch
        ),
        "forces": normalizer.denormalize_forces(output.forces),
        "energy_label": batch.energy,
        "forces_label": batch.forces,
        "fixed": batch.fixed,
        "n_atoms": batch.natoms,
        **_virials(output, batch, normalizer),
    }


def _virials(output: Any, batch: Data, normalizer: Normalizer) -> dict[str, Tensor]:
    """Virials (B, 3, 3) float64 in eV, NaN if unknown, and volumes (B,) in Å³.

    The volume is 0 with fewer than three periodic directions.
    """
    cells = batch.cell.double()
    unknown = torch.full_like(cells, float("nan"))
    virial = unknown
    if output.virial is not None:
        virial = normalizer.denormalize_virial(output.virial.double())
    periodic = batch.pbc.reshape(-1, 3).bool().all(dim=1)
    return {
        "virial": virial,
        "virial_label": batch.get("virial", unknown),
        "volume": torch.where(periodic, torch.linalg.det(cells).abs(), 0.0),
    }


def _no_results() -> dict[str, Tensor]:
    """Return empty arrays of predictions, for a process without a batch."""
    return {
        "energy": torch.zeros(0, dtype=torch.float64),
        "forces": torch.zeros(0, 3),
        "energy_label": torch.zeros(0, dtype=torch.float64),
        "forces_label": torch.zeros(0, 3),
        "fixed": torch.zeros(0, dtype=torch.bool),
        "n_atoms": torch.zeros(0, dtype=torch.int64),
        "virial": torch.zeros(0, 3, 3, dtype=torch.float64),
        "virial_label": torch.zeros(0, 3, 3, dtype=torch.float64),
        "volume": torch.zeros(0, dtype=torch.float64),
    }


def teacher_metrics(split: Split) -> dict[str, float] | None:
    """Compute metrics of stored teacher predictions, None if the store has none."""
    names = ("teacher_energy", "teacher_forces", "energy", "forces", "fixed")
    paths = {name: FIELDS[name].path for name in names}
    if paths["teacher_energy"] not in split.arrays:
        return None
    stress = {name: FIELDS[name].path for name in ("virial", "teacher_virial")}
    if all(path in split.arrays for path in stress.values()):
        paths |= stress | {name: FIELDS[name].path for name in ("cell", "pbc")}
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
        if "virial" in values:
            periodic = values["pbc"].bool().all(dim=1)
            volume = torch.linalg.det(values["cell"]).abs()
            sums.add_virials(
                values["teacher_virial"],
                values["virial"],
                torch.where(periodic, volume, 0.0),
            )
    return sums.result()
