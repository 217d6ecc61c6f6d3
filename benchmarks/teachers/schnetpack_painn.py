"""The PaiNN that schnetpack's authors trained on rMD17 ethanol, as a teacher.

Weights are safetensors under simplified names, hyperparameters in the file's metadata;
the equations are those of PaiNN (arXiv:2102.03150). The folder is a package as pip
would leave it, so ``PYTHONPATH=benchmarks/teachers`` is all that installs it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import linear, silu

from pipeline.errors import SpecError
from pipeline.files.atomic import sha256_of
from pipeline.graphs.neighbors import NeighborSpec
from pipeline.models.normalizer import NUM_REFERENCES, Normalizer
from pipeline.spec.sections import TeacherSpec
from pipeline.teachers.batch import collate_graphs, structure_edge_vectors
from pipeline.teachers.potential import FieldInfo, Potential, SampleGraph


def load(spec: TeacherSpec) -> "SchnetpackPainn":
    """The network of ``spec.checkpoint``."""
    if spec.checkpoint is None:
        raise SpecError("teacher.checkpoint is missing; schnetpack_painn needs a file.")
    return SchnetpackPainn(Path(spec.checkpoint))


class SchnetpackPainn(Potential):
    """PaiNN with a cosine cutoff and Gaussian distances; kcal/mol inside."""

    elements = (1, 6, 8)

    def __init__(self, path: Path) -> None:
        self._sha256 = sha256_of(path)
        with safe_open(path, "pt") as file:
            self._about: dict[str, Any] = json.loads(file.metadata()["config"])
            names = file.keys()
            self._weights = {name: file.get_tensor(name) for name in names}
        width = self._about["hidden"]
        self._unit = float(self._about["energy_unit_in_eV"])
        self.graph_rule = NeighborSpec(self._about["cutoff"], 10**6, symmetric=False)
        self.available_fields = {
            "node_features": FieldInfo("node_features", width),
            "vector_features": FieldInfo("vector_features", width),
            "per_atom_energy": FieldInfo("per_atom_energy", 0),
        }
        # What is left of energies and forces is of the order of 1 eV and 1 eV/Å.
        offset = self._about["energy_per_atom_offset"] * self._unit
        self.normalizer = Normalizer(element_references=(offset,) * NUM_REFERENCES)
        self._offset = offset
        self._device = torch.device("cpu")

    @property
    def identity(self) -> dict[str, Any]:
        """The file's hash; it holds the hyperparameters, too."""
        return {"checkpoint_sha256": self._sha256}

    def to(self, device: torch.device) -> None:
        """Move the weights to ``device``."""
        self._weights = {k: v.to(device) for k, v in self._weights.items()}
        self._device = device

    def forward(
        self,
        graphs: Sequence[SampleGraph],
        fields: Sequence[str],
        layers: Mapping[str, str],
    ) -> Mapping[str, Tensor]:
        """Fields in eV and Å; hidden states are those of the last layer."""
        batch = collate_graphs(graphs, self._device)
        found = [
            structure_edge_vectors(graph.structure, graph.edges) for graph in graphs
        ]
        vectors = torch.from_numpy(np.concatenate(found)).float().to(self._device)
        with torch.enable_grad():
            vectors.requires_grad_(True)
            node, vector = self._states(batch.atomic_numbers, batch.edge_index, vectors)
            atoms = self._layer("out.1", silu(self._layer("out.0", node))).squeeze(1)
            (slope,) = torch.autograd.grad(atoms.sum(), vectors)
        source, target = batch.edge_index  # vectors point from target to source
        forces = slope.new_zeros(len(atoms), 3)
        forces.index_add_(0, target, slope).index_add_(0, source, -slope)
        energies = atoms.detach().double() * self._unit
        total = batch.sum_atoms(energies) + self._offset * batch.n_atoms
        return {
            "teacher_energy": total,
            "teacher_forces": forces * self._unit,
            "per_atom_energy": energies.float(),
            "node_features": node.detach(),
            "vector_features": vector.detach(),
        }

    def _states(
        self, numbers: Tensor, edge_index: Tensor, vectors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scalars (N, C) and vectors (N, 3, C) of the last layer."""
        weights, (source, target) = self._weights, edge_index
        distance = vectors.norm(dim=1, keepdim=True)
        unit = (vectors / distance)[:, :, None]
        cutoff = self._about["cutoff"]
        inside = 0.5 * (torch.cos(torch.pi * distance / cutoff) + 1)
        inside = inside * (distance < cutoff)
        steps = (distance - weights["rbf.offsets"]) / weights["rbf.widths"]
        filters = self._layer("filter_net", torch.exp(-0.5 * steps**2)) * inside
        node = weights["embedding.weight"][numbers]
        vector = node.new_zeros(len(node), 3, node.shape[1])
        per_layer = filters.chunk(self._about["layers"], dim=1)
        for number, own in enumerate(per_layer):
            message = self._mlp(f"msg.{number}", node)[source] * own
            scalar, along, copied = message.chunk(3, dim=1)
            moved = along[:, None] * unit + copied[:, None] * vector[source]
            node = node.index_add(0, target, scalar)
            vector = vector.index_add(0, target, moved)
            node, vector = self._updated(f"upd.{number}", node, vector)
        return node, vector

    def _updated(
        self, name: str, node: Tensor, vector: Tensor
    ) -> tuple[Tensor, Tensor]:
        mixed = linear(vector, self._weights[f"{name}.mix.weight"])
        first, second = mixed.chunk(2, dim=2)
        length = (first.square().sum(1) + self._about["vector_norm_eps"]).sqrt()
        update = self._mlp(name, torch.cat((node, length), dim=1))
        scalar, scale, product = update.chunk(3, dim=1)
        node = node + scalar + product * (first * second).sum(1)
        return node, vector + scale[:, None] * second

    def _mlp(self, name: str, values: Tensor) -> Tensor:
        return self._layer(f"{name}.1", silu(self._layer(f"{name}.0", values)))

    def _layer(self, name: str, values: Tensor) -> Tensor:
        return linear(
            values, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        )
