"""Finished students: finding the file, reading it, and what it was trained on.

Nothing of training is imported here, so that a student can be used without it.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from ase.data import chemical_symbols
from torch import Tensor
from torch_geometric.data import Data

from pipeline.errors import CheckpointError
from pipeline.models.checkpoint import LoadedModel, load_checkpoint
from pipeline.models.derivatives import predict_gradients
from pipeline.models.elements import (
    TRAINING_DATA,
    trained_elements,
    usable_elements,
)
from pipeline.models.output import ModelOutput

STUDENT_FILE = "student.safetensors"
# Parts of a composition, per atom, that count as zero.
_ROUNDING = 1e-6
Elements = Container[int]


def student_file(place: Path) -> Path:
    """Return the model file of a run folder, or ``place`` itself if it is a file.

    Raises
    ------
    CheckpointError
        There is neither.
    """
    if not place.is_dir():
        if not place.exists():
            raise CheckpointError(
                f"{place} does not exist; name a run folder or a model file."
            )
        return place
    if not (place / STUDENT_FILE).exists():
        raise CheckpointError(
            f"{place} has no {STUDENT_FILE}, so it is not the folder of a run with "
            "at least one validation; train with `kd-train` or name a model file."
        )
    return place / STUDENT_FILE


def load_student(place: Path, device: torch.device | None = None) -> LoadedModel:
    """Load the student of a run folder, or any model that ``load_checkpoint`` reads.

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
    """Predict energies (B,) float64 in eV and forces (N, 3) in eV/Å of a batch.

    Forces are None if the model does not predict forces.
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


@dataclass(frozen=True)
class Prediction:
    """Results for a batch of B structures with N atoms, in eV and Å.

    ``energy`` (B,) float64 and its parts ``energies`` (N,) float64, ``forces`` (N, 3)
    or None, ``virial`` (B, 3, 3) or None: minus the volume times the stress.
    """

    energy: Tensor
    energies: Tensor
    forces: Tensor | None
    virial: Tensor | None

    def present(self) -> dict[str, Tensor]:
        """Return energy and, if they exist, forces and virial by name."""
        values = {name: getattr(self, name) for name in ("energy", "forces", "virial")}
        return {name: value for name, value in values.items() if value is not None}


def predict_consistently(
    student: LoadedModel, batch: Data, *, gradient: bool = False
) -> Prediction:
    """Predict in such a way that gradient forces are the gradient of the energy.

    Forces that are gradients and virials have the scale of the energy. Forces of a head
    have their own scale and no virial; with ``gradient``, the head is left out.
    """
    normalizer = student.normalizer
    with torch.no_grad():
        model = student.model
        output = predict_gradients(model, batch) if gradient else model(batch)
        numbers, index = batch.atomic_numbers, batch.batch
        energy = normalizer.denormalize_energy(output.energy, numbers, index)
        forces = output.forces
        if forces is not None and output.virial is None:
            forces = normalizer.denormalize_forces(forces)
        elif forces is not None:
            forces = forces * normalizer.energy_std
        virial = output.virial
        if virial is not None:
            virial = normalizer.denormalize_virial(virial)
        return Prediction(energy, _shares(student, output, batch), forces, virial)


def _shares(student: LoadedModel, output: ModelOutput, batch: Data) -> Tensor:
    """Return the parts (N,) of atoms in the energies, in eV; their sums are energies.

    Atoms share the mean energy of the normaliser equally.
    """
    normalizer, settings = student.normalizer, student.model.hyperparameters
    natoms = batch.natoms[batch.batch].double()  # (N,)
    shares = output.per_atom_energy.double() * normalizer.energy_std
    if settings.get("readout") == "mean" or settings.get("extensive") is False:
        shares = shares / natoms
    references = torch.tensor(
        normalizer.element_references, dtype=torch.float64, device=shares.device
    )
    return shares + references[batch.atomic_numbers] + normalizer.energy_mean / natoms


def reference_energies(student: LoadedModel) -> dict[str, float]:
    """Return energies of isolated atoms (eV) that the student's energies contain.

    By symbol, of the elements that have one; empty of energies without references,
    such as adsorption energies.
    """
    references = student.normalizer.element_references
    return {chemical_symbols[z]: e for z, e in enumerate(references) if e != 0.0}


def known_elements(student: LoadedModel, option: str, any_element: bool) -> Elements:
    """Return the elements that ``student`` accepts.

    With ``any_element`` these are all elements that the network can embed.

    ``option`` is the caller's spelling of ``any_element``, for messages.
    """
    trained = trained_elements(student.normalizer, student.provenance)
    known = None if any_element else trained
    return usable_elements(student.model.elements, known, option)


def untrained_elements(
    student: LoadedModel, atomic_numbers: Iterable[int]
) -> list[int]:
    """Return elements that the training data of ``student`` lacked, ascending.

    Empty if the file does not list the elements of the training data.
    """
    trained = trained_elements(student.normalizer, student.provenance)
    numbers = set(map(int, atomic_numbers))
    return [] if trained is None else sorted(numbers - trained)


def unlisted_elements_warning(student: LoadedModel) -> str | None:
    """Return a warning if a file does not list the elements of its training data."""
    if trained_elements(student.normalizer, student.provenance) is not None:
        return None
    return (
        "the model file does not list the elements of its training data, so no "
        "element is refused"
    )


def undetermined_elements(
    student: LoadedModel, atomic_numbers: npt.ArrayLike
) -> list[int]:
    """Return elements whose reference energies make a structure's energy arbitrary.

    ``atomic_numbers`` (N,) of its atoms. Empty if the composition is one of the
    training data, or a combination of such.
    """
    about = student.provenance.get(TRAINING_DATA)
    free = about.get("undetermined", []) if isinstance(about, dict) else []
    if not free:
        return []
    numbers, counts = np.unique(np.asarray(atomic_numbers), return_counts=True)
    found: set[int] = set()
    for direction in free:
        parts = {int(z): float(part) for z, part in direction.items()}
        change = sum(
            int(count) * parts.get(int(z), 0.0)
            for z, count in zip(numbers, counts, strict=True)
        )
        if abs(change) > _ROUNDING * len(np.atleast_1d(atomic_numbers)):
            found |= {z for z, part in parts.items() if abs(part) > _ROUNDING}
    return sorted(found & set(numbers.tolist()))
