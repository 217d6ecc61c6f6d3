"""A trained network in, named fields in eV and Å out; knows nothing of the store."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from pipeline.errors import CheckpointError, SpecError
from pipeline.fields import EDGE_IDENTITY_FIELDS, FIELDS, PREDICTION_FIELDS
from pipeline.files import sha256_of
from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import Edges, neighbor_edges, sample_edges
from pipeline.models.checkpoint import LoadedModel, load_checkpoint
from pipeline.models.elements import check_elements
from pipeline.spec import TeacherSpec
from pipeline.structure import Sample, Structure

log = logging.getLogger("pipeline.teacher")
Arrays = dict[str, npt.NDArray[Any]]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Teacher:
    """A frozen network on a device, with what it takes to name its outputs.

    ``layers`` names the layer of every field that is not taken from the default one.
    """

    loaded: LoadedModel
    spec: TeacherSpec
    device: torch.device
    layers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        spec: TeacherSpec,
        device: str = "cpu",
        layers: Mapping[str, str] | None = None,
    ) -> "Teacher":
        """The teacher of a resolved spec, ready to predict.

        Raises
        ------
        CheckpointError
            The file is not what the spec says, or lacks scale factors.
        SpecError
            The model has no such layer for a field.
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
        if not loaded.model.hyperparameters["regress_forces"]:
            raise CheckpointError(
                f"{spec.checkpoint} holds a model without forces, which every store "
                "keeps; choose a teacher that predicts them."
            )
        loaded.model.to(device).eval().requires_grad_(False)
        teacher = cls(loaded, spec, torch.device(device), dict(layers or {}))
        teacher._check_layers()
        if spec.precision == "tf32" and teacher.device.type != "cuda":
            log.warning("teacher.precision: tf32 changes nothing on %s", device)
        return teacher

    @property
    def widths(self) -> dict[str, int]:
        """Width of every field this teacher can give; 0 for fields without channels."""
        model = self.loaded.model
        chosen = {
            name: model.layer_width(name, layer) or 0
            for name, layer in self.layers.items()
        }
        return {"per_atom_energy": 0, **model.widths, **chosen}

    def check_fields(self, names: Sequence[str]) -> None:
        """Raise SpecError when a field of the spec is none of this teacher's."""
        for name in names:
            if name not in self.widths:
                raise SpecError(
                    f"features: teacher {self.spec.model!r} has no {name!r}; it offers "
                    f"{', '.join(sorted(self.widths))}{self._elsewhere(name)}."
                )

    def _elsewhere(self, name: str) -> str:
        """Say at which layers a field exists that the default layer lacks."""
        model = self.loaded.model
        layers = [layer for layer in model.layers if model.layer_width(name, layer)]
        return f", and {name} with layer: {' | '.join(layers)}" if layers else ""

    def _check_layers(self) -> None:
        model = self.loaded.model
        for name, layer in self.layers.items():
            offered = [one for one in model.layers if model.layer_width(name, one)]
            if layer not in offered:
                raise SpecError(
                    f"features.{name}.layer is {layer!r}; teacher {self.spec.model!r} "
                    f"offers {', '.join(offered) or 'no other layer'} for it."
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
            "scale_factors": self.loaded.provenance.get("scale_factors"),
            "weights": self.spec.weights,
            "precision": self.spec.precision,
            "layers": dict(self.layers),
            "vector_direction": "target to source",
            "batch_atoms": self.spec.batch_atoms,
            "batch_gib": self.spec.batch_gib,
            "graph_rule": asdict(self.loaded.model.graph_rule),
            "normalizer": self.loaded.normalizer.to_dict(),
        }

    def count_edges(self, structure: Structure) -> int:
        """Number of edges that ``edge_features`` of a structure will have."""
        return len(neighbor_edges(structure, self.loaded.model.graph_rule))

    def predict(self, samples: Sequence[Sample], fields: Sequence[str]) -> Arrays:
        """Energies, forces and ``fields`` of ``samples``, in their order.

        Node fields come concatenated over samples, (ΣN, ...); ``teacher_energy`` is
        (len(samples),) float64 in eV, ``teacher_forces`` (ΣN, 3) in eV/Å.
        ``edge_features`` (ΣE, C) bring ``edge_index`` (ΣE, 2) and ``cell_offsets``
        (ΣE, 3), edges sorted by (target, source, shift) within each sample.

        Raises
        ------
        DataError
            A sample has an element the model does not know, or no neighbours.
        """
        names = (*PREDICTION_FIELDS, *fields)
        if "edge_features" in fields:
            names += EDGE_IDENTITY_FIELDS
        parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
        # Graphs of the next batch are made while the network works on this one.
        for group in _one_ahead(self._groups(samples)):
            for name, values in self._predict_group(group, names).items():
                parts[name].append(values)
        return {name: np.concatenate(pieces) for name, pieces in parts.items()}

    def precision_error(
        self, samples: Sequence[Sample], fields: Sequence[str]
    ) -> dict[str, float]:
        """Error of reduced precision, by field: RMS of the difference to float32.

        Features, relative to the RMS of the field; energies in eV, forces in eV/Å.
        """
        exact = replace(
            self, spec=self.spec.model_copy(update={"precision": "float32"})
        )
        wanted, found = exact.predict(samples, fields), self.predict(samples, fields)
        errors = {}
        for name in (*PREDICTION_FIELDS, *fields):
            difference = _rms(found[name].astype(np.float64) - wanted[name])
            absolute = name in PREDICTION_FIELDS
            scale = 1.0 if absolute else _rms(wanted[name].astype(np.float64))
            errors[name] = difference / scale if scale else 0.0
        return errors

    def _groups(self, samples: Sequence[Sample]) -> Iterator[list["_Graph"]]:
        """Consecutive samples with their edges, as many as one forward pass takes."""
        group: list[_Graph] = []
        atoms = size = 0
        for sample in samples:
            graph = _Graph(sample.structure, self._edges(sample))
            need = self.loaded.model.memory_of(graph.edges, len(graph.structure))
            many = atoms + len(graph.structure) > self.spec.batch_atoms
            if group and (many or size + need > self.spec.batch_gib * 2**30):
                yield group
                group, atoms, size = [], 0, 0
            group.append(graph)
            atoms += len(graph.structure)
            size += need
        if group:
            yield group

    def _predict_group(self, group: Sequence["_Graph"], names: Sequence[str]) -> Arrays:
        edges = [graph.edges for graph in group]
        batch = collate([graph.structure for graph in group], edges)
        batch = batch.to(self.device)
        layers = {name: self.layers[name] for name in names if name in self.layers}
        with torch.no_grad(), _computing_in(self.spec.precision, self.device):
            output = self.loaded.model(batch, layers)
        normalizer = self.loaded.normalizer
        values = {
            "teacher_energy": normalizer.denormalize_energy(
                output.energy, batch.atomic_numbers, batch.batch
            ),
            "teacher_forces": normalizer.denormalize_forces(output.forces.float()),
            "per_atom_energy": output.per_atom_energy.float() * normalizer.energy_std,
        }
        identity = {
            "edge_index": np.concatenate([e.edge_index.T for e in edges]),
            "cell_offsets": np.concatenate([e.cell_offsets for e in edges]),
        }
        arrays: Arrays = {}
        for name in names:
            if name in identity:
                arrays[name] = identity[name]  # the writer checks that they fit
                continue
            tensor = values[name] if name in values else getattr(output, name).float()
            arrays[name] = tensor.detach().cpu().numpy()
        return arrays

    def _edges(self, sample: Sample) -> Edges:
        model = self.loaded.model
        numbers = sample.structure.atomic_numbers
        check_elements(numbers, model.elements, [sample.sample_id] * len(numbers))
        return sample_edges(sample.sample_id, sample.structure, model.graph_rule)


@dataclass(frozen=True)
class _Graph:
    structure: Structure
    edges: Edges


def width_shape(name: str, width: int) -> tuple[int, ...]:
    """Trailing shape of field ``name`` for a teacher ``width`` channels wide."""
    return tuple(width if size is None else size for size in FIELDS[name].shape)


def _computing_in(
    precision: str, device: torch.device
) -> AbstractContextManager[object]:
    """Context in which matrix products have a reduced precision."""
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return _tf32() if precision == "tf32" else nullcontext()


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Pass on ``items``; each is made in a thread while the one before is used."""
    end = object()
    with ThreadPoolExecutor(max_workers=1) as thread:
        pending = thread.submit(next, items, end)
        while (item := pending.result()) is not end:
            pending = thread.submit(next, items, end)
            yield item  # type: ignore[misc]


def _rms(values: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0
