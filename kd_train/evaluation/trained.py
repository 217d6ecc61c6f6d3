"""Finished students: finding the file, reading it, and what it was trained on.

Nothing of training is imported here, so that a student can be used without it.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch_geometric.data import Data

from pipeline.errors import CheckpointError
from pipeline.models.checkpoint import LoadedModel, load_checkpoint
from pipeline.models.normalizer import Normalizer

STUDENT_FILE = "student.safetensors"


def student_file(place: Path) -> Path:
    """The model file of a run folder, or ``place`` itself where it is a file.

    Raises
    ------
    CheckpointError
        There is neither.
    """
    if not place.is_dir():
        if not place.exists():
            raise CheckpointError(f"There is no run folder or model file {place}.")
        return place
    if not (place / STUDENT_FILE).exists():
        raise CheckpointError(
            f"{place} has no {STUDENT_FILE}, so it is not the folder of a run that was "
            "validated at least once; train with `kd-train` or name a model file."
        )
    return place / STUDENT_FILE


def load_student(place: Path, device: torch.device | None = None) -> LoadedModel:
    """The student of a run folder, or any model that ``load_checkpoint`` reads.

    In evaluation mode on ``device``, without gradients of its weights.

    Raises
    ------
    CheckpointError
        There is no model, or its file is damaged.
    """
    loaded = load_checkpoint(student_file(place))
    loaded.model.requires_grad_(False)
    if device is not None:
        loaded.model.to(device)
    return loaded


def predict(student: LoadedModel, batch: Data) -> tuple[Tensor, Tensor | None]:
    """Energies (B,) float64 in eV and forces (N, 3) in eV/Å of a batch on its device.

    Forces are None of a model that has none.
    """
    normalizer = student.normalizer
    with torch.no_grad():
        output = student.model(batch)
        energy = normalizer.denormalize_energy(
            output.energy, batch.atomic_numbers, batch.batch
        )
        if output.forces is None:
            return energy, None
        return energy, normalizer.denormalize_forces(output.forces)


def without_reference(
    normalizer: Normalizer, atomic_numbers: Iterable[int]
) -> list[int]:
    """Elements that the labels of the training split did not contain, ascending.

    A normaliser with fitted reference energies has one for each element that occurred;
    one without any references does not tell, and the list is empty.
    """
    references = normalizer.element_references
    if not any(references):
        return []
    return sorted({z for z in map(int, atomic_numbers) if references[z] == 0.0})
