"""A trained network in, named fields in eV and Å out; knows nothing of the store."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.errors import CheckpointError, SpecError
from pipeline.fields import FIELDS, PREDICTION_FIELDS
from pipeline.files import sha256_of
from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import Edges, sample_edges
from pipeline.models.checkpoint import LoadedModel, load_checkpoint
from pipeline.models.elements import check_elements
from pipeline.spec import TeacherSpec
from pipeline.structure import Sample

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Teacher:
    """A frozen network on a device, with what it takes to name its outputs."""

    loaded: LoadedModel
    spec: TeacherSpec
    device: torch.device

    @classmethod
    def load(cls, spec: TeacherSpec, device: str = "cpu") -> "Teacher":
        """The teacher of a resolved spec, ready to predict.

        Raises
        ------
        CheckpointError
            The file is not what the spec says, or lacks scale factors.
        """
        scale_file = None if spec.scale_file is None else Path(spec.scale_file)
        loaded = load_checkpoint(
            Path(spec.checkpoint), scale_file=scale_file, weights=spec.weights
        )
        if loaded.name != spec.model:
            raise CheckpointError(
                f"{spec.checkpoint} holds a {loaded.name}, but teacher.model is "
                f"{spec.model!r}; set teacher.model={loaded.name}."
            )
        loaded.model.to(device).eval().requires_grad_(False)
        return cls(loaded, spec, torch.device(device))

    @property
    def widths(self) -> dict[str, int]:
        """Width of every field this teacher can give; 0 for fields without channels."""
        return {"per_atom_energy": 0, **self.loaded.model.widths}

    def check_fields(self, names: Sequence[str]) -> None:
        """Raise SpecError when a field of the spec is none of this teacher's."""
        for name in names:
            if name not in self.widths:
                raise SpecError(
                    f"features: teacher {self.spec.model!r} has no {name!r}; it offers "
                    f"{', '.join(sorted(self.widths))}."
                )

    @property
    def identity(self) -> dict[str, Any]:
        """Everything about the teacher that decides its numbers; JSON-able."""
        scale = self.spec.scale_file
        return {
            "model": self.spec.model,
            "hyperparameters": self.loaded.model.hyperparameters,
            "checkpoint_sha256": self.loaded.sha256,
            "scale_file_sha256": None if scale is None else sha256_of(Path(scale)),
            "weights": self.spec.weights,
            "precision": self.spec.precision,
            "batch_atoms": self.spec.batch_atoms,
            "graph_rule": asdict(self.loaded.model.graph_rule),
            "normalizer": self.loaded.normalizer.to_dict(),
        }

    def predict(self, samples: Sequence[Sample], fields: Sequence[str]) -> Arrays:
        """Energies, forces and ``fields`` of ``samples``, in their order.

        Node fields come concatenated over samples, (ΣN, ...); ``teacher_energy`` is
        (len(samples),) float64 in eV, ``teacher_forces`` (ΣN, 3) in eV/Å.

        Raises
        ------
        DataError
            A sample has an element the model does not know, or no neighbours.
        """
        names = (*PREDICTION_FIELDS, *fields)
        parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
        for group in _by_atoms(samples, self.spec.batch_atoms):
            for name, values in self._predict_batch(group, names).items():
                parts[name].append(values)
        return {name: np.concatenate(pieces) for name, pieces in parts.items()}

    def _predict_batch(self, samples: Sequence[Sample], names: Sequence[str]) -> Arrays:
        edges = [self._edges(sample) for sample in samples]
        batch = collate([sample.structure for sample in samples], edges)
        batch = batch.to(self.device)
        with torch.no_grad():
            output = self.loaded.model(batch)
        normalizer = self.loaded.normalizer
        values = {
            "teacher_energy": normalizer.denormalize_energy(
                output.energy, batch.atomic_numbers, batch.batch
            ),
            "teacher_forces": normalizer.denormalize_forces(output.forces),
            "per_atom_energy": output.per_atom_energy * normalizer.energy_std,
            "node_features": output.node_features,
            "vector_features": output.vector_features,
        }
        return {name: values[name].detach().cpu().numpy() for name in names}

    def _edges(self, sample: Sample) -> Edges:
        model = self.loaded.model
        numbers = sample.structure.atomic_numbers
        check_elements(numbers, model.elements, [sample.sample_id] * len(numbers))
        return sample_edges(sample.sample_id, sample.structure, model.graph_rule)


def width_shape(name: str, width: int) -> tuple[int, ...]:
    """Trailing shape of field ``name`` for a teacher ``width`` channels wide."""
    return tuple(width if size is None else size for size in FIELDS[name].shape)


def _by_atoms(samples: Sequence[Sample], budget: int) -> Iterator[list[Sample]]:
    """Consecutive groups of at most ``budget`` atoms, at least one sample each."""
    group: list[Sample] = []
    atoms = 0
    for sample in samples:
        if group and atoms + len(sample.structure) > budget:
            yield group
            group, atoms = [], 0
        group.append(sample)
        atoms += len(sample.structure)
    if group:
        yield group
