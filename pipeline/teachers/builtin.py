"""GemNet-OC, PaiNN and SchNet, the models of this project, as teachers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import CheckpointError, SpecError
from pipeline.fields import CACHEABLE_FIELDS
from pipeline.files.atomic import sha256_of
from pipeline.graphs.batch import collate
from pipeline.models.checkpoint import LoadedModel, load_checkpoint
from pipeline.models.contents import Weights
from pipeline.models.elements import trained_elements, usable_elements
from pipeline.models.network import Network
from pipeline.spec.sections import TeacherSpec
from pipeline.teachers.potential import FieldInfo, Guarantees, Potential, SampleGraph


def load(spec: TeacherSpec) -> "BuiltinPotential":
    """The model in ``spec.checkpoint``.

    Raises
    ------
    SpecError
        No checkpoint is named, or options are given.
    CheckpointError
        The file is not what the spec says, or lacks scale factors or forces.
    """
    if spec.checkpoint is None:
        raise SpecError(
            f"teacher.checkpoint is missing; {spec.model} needs a file of weights."
        )
    any_element = _any_element(spec)
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
            f"{spec.checkpoint} holds a model without forces; choose a teacher that "
            "predicts forces."
        )
    return BuiltinPotential(loaded, spec.weights, scale_file, any_element)


def _any_element(spec: TeacherSpec) -> bool:
    """Whether elements that the training data lacked are accepted: the one option."""
    unknown = sorted(spec.options.keys() - {"any_element"})
    if unknown:
        raise SpecError(
            f"teacher.options: {spec.model} has no option {unknown[0]!r} (known: "
            "any_element)."
        )
    value = spec.options.get("any_element", False)
    if not isinstance(value, bool):
        raise SpecError(f"teacher.options.any_element is {value!r}; set true or false.")
    return value


class BuiltinPotential(Potential):
    """One of our networks; ``loaded`` has the model and its normaliser.

    Elements are those of its training data, where the file states these, unless
    ``any_element`` accepts all that the network can embed.
    """

    precisions = ("float32", "tf32", "bfloat16")

    def __init__(
        self,
        loaded: LoadedModel,
        weights: Weights,
        scale_file: Path | None,
        any_element: bool = False,
    ) -> None:
        self.loaded = loaded
        self._weights = weights
        self._scale_file_sha256 = None if scale_file is None else sha256_of(scale_file)
        model = loaded.model.eval().requires_grad_(False)
        self.available_fields = _available_fields(model)
        self.graph_rule = model.graph_rule
        trained = trained_elements(loaded.normalizer, loaded.provenance)
        self.elements = usable_elements(
            model.elements,
            None if any_element else trained,
            "teacher.options.any_element=true",
        )
        self.normalizer = loaded.normalizer
        self.provenance = loaded.provenance
        # With two scales, forces are not the gradient of the energy in eV.
        scaled_alike = self.normalizer.energy_std == self.normalizer.force_std
        direct = model.hyperparameters.get("direct_forces", False)
        self.guarantees = Guarantees(
            # Which edges a limit keeps when they come in pairs depends on the order.
            permutation=not model.graph_rule.symmetric,
            gradient_forces=scaled_alike and not direct,
        )
        self.has_virial = not direct
        self._device = torch.device("cpu")

    @property
    def identity(self) -> dict[str, Any]:
        """Hyperparameters, and the hashes of weights and scale factors."""
        return {
            "hyperparameters": self.loaded.model.hyperparameters,
            "checkpoint_sha256": self.loaded.sha256,
            "scale_file_sha256": self._scale_file_sha256,
            "scale_factors": self.loaded.provenance.get("scale_factors"),
            "weights": self._weights,
            "vector_direction": "target to source",
        }

    def to(self, device: torch.device) -> None:
        """Move the model to ``device``."""
        self.loaded.model.to(device)
        self._device = device

    def estimate_memory(self, graph: SampleGraph) -> int:
        """Return the network's own estimate of its memory in bytes."""
        return self.loaded.model.estimate_memory(graph.edges, len(graph.structure))

    def forward(
        self,
        graphs: Sequence[SampleGraph],
        fields: Sequence[str],
        layers: Mapping[str, str],
    ) -> Mapping[str, Tensor]:
        """Fields in eV and Å; hidden states in the network's own units."""
        batch = collate(
            [graph.structure for graph in graphs], [graph.edges for graph in graphs]
        ).to(self._device)
        output = self.loaded.model(batch, layers)
        energy = self.normalizer.denormalize_energy(
            output.energy, batch.atomic_numbers, batch.batch
        )
        forces = self.normalizer.denormalize_forces(output.forces.float())
        atoms = output.per_atom_energy.float() * self.normalizer.energy_std
        values = {
            "teacher_energy": energy,
            "teacher_forces": forces,
            "per_atom_energy": atoms,
        }
        if output.virial is not None:
            virial = self.normalizer.denormalize_virial(output.virial.double())
            values["teacher_virial"] = virial
        hidden = {n: getattr(output, n) for n in fields if n not in values}
        return values | hidden


def _available_fields(model: Network) -> dict[str, FieldInfo]:
    """Fields with their widths at the default layer and at all others."""
    available_fields = {"per_atom_energy": FieldInfo("per_atom_energy", 0)}
    for name in CACHEABLE_FIELDS:
        layers = {layer: model.layer_width(name, layer) for layer in model.layers}
        present = {layer: width for layer, width in layers.items() if width}
        if name in model.widths or present:
            available_fields[name] = FieldInfo(name, model.widths.get(name), present)
    return available_fields
