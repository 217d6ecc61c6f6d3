"""MACE as teacher; package ``mace-torch``, files are whole pickled models.

Options: ``trust_pickle: true``, without which no file is opened, and ``head`` for
models of several heads (default: their last one).
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import CheckpointError, SpecError
from pipeline.files.atomic import sha256_of
from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import NeighborSpec
from pipeline.models.normalizer import NUM_REFERENCES, Normalizer
from pipeline.spec.sections import TeacherSpec
from pipeline.teachers.capture import capture_outputs
from pipeline.teachers.irreps import invariants, vectors
from pipeline.teachers.potential import FieldInfo, Potential, SampleGraph
from pipeline.teachers.trust import check_options, require_trust

OPTIONS = {"trust_pickle": False, "head": None}
# Importing mace makes torch.load run code by default, for the whole process.
_UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def load(spec: TeacherSpec) -> "Mace":
    """The MACE in ``spec.checkpoint``, in the precision of its weights.

    Raises
    ------
    SpecError
        No file is named, its owner does not vouch for it, or a head is unknown.
    CheckpointError
        The file holds something else.
    """
    options = check_options(spec, OPTIONS)
    if spec.checkpoint is None:
        raise SpecError("teacher.checkpoint is missing; mace needs a file of a model.")
    require_trust(spec)
    path = Path(spec.checkpoint)
    with _preserve_environment():
        from mace.modules import MACE

        model = torch.load(path, map_location="cpu", weights_only=False)
    if not isinstance(model, MACE):
        raise CheckpointError(f"{path} holds a {type(model).__name__}, not a MACE.")
    heads = list(model.heads)
    head = options["head"] or heads[-1]
    if head not in heads:
        raise SpecError(
            f"teacher.options.head is {head!r}; this MACE has {', '.join(heads)}."
        )
    model = model.eval().requires_grad_(False)
    return Mace(model, heads.index(head), sha256_of(path), path.name)


@contextmanager
def _preserve_environment() -> Iterator[None]:
    """Undo what imports inside change about how torch loads files."""
    before = os.environ.get(_UNSAFE)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_UNSAFE, None)
        else:
            os.environ[_UNSAFE] = before


class Mace(Potential):
    """A MACE with the energies of its isolated atoms; ``block<k>`` follow layer k."""

    model: Any

    def __init__(self, model: Any, head: int, sha256: str, file: str) -> None:
        self.model = model
        self.head = head
        self._sha256 = sha256
        self._blocks = {f"block{k}": m for k, m in enumerate(model.products, 1)}
        irreps = {n: str(m.linear.irreps_out) for n, m in self._blocks.items()}
        found = {
            "node_features": {n: invariants(text) for n, text in irreps.items()},
            "vector_features": {n: vectors(text) for n, text in irreps.items()},
        }
        self._channels = {
            name: {layer: one for layer, one in channels.items() if one.count}
            for name, channels in found.items()
        }
        self.available_fields = {"per_atom_energy": FieldInfo("per_atom_energy", 0)}
        for name, channels in self._channels.items():
            layers = {layer: one.count for layer, one in channels.items()}
            if layers:
                self.available_fields[name] = FieldInfo(
                    name, list(layers.values())[-1], layers
                )
        self.graph_rule = NeighborSpec(
            float(model.r_max), max_neighbors=2**31, symmetric=False
        )
        self.elements = set(model.atomic_numbers.tolist())
        self.normalizer = _normalizer(model, head)
        self.has_virial = True
        self.provenance = {
            "package": f"mace-torch {version('mace-torch')}",
            "file": file,
        }
        self._device = torch.device("cpu")

    @property
    def identity(self) -> dict[str, Any]:
        """The hash of the file and the head."""
        return {"checkpoint_sha256": self._sha256, "head": self.head}

    def to(self, device: torch.device) -> None:
        """Move the model to ``device``."""
        self.model.to(device)
        self._device = device

    def forward(
        self,
        graphs: Sequence[SampleGraph],
        fields: Sequence[str],
        layers: Mapping[str, str],
    ) -> Mapping[str, Tensor]:
        """Fields in eV and Å; hidden states after the product of a layer."""
        data = self._input(graphs)
        with torch.enable_grad(), capture_outputs(self._blocks) as states:
            output = self.model(data, compute_force=True, compute_virials=True)
        atoms = output["node_energy"].detach().double()
        references = torch.tensor(
            self.normalizer.element_references, dtype=atoms.dtype, device=atoms.device
        )
        energy = atoms.new_zeros(len(graphs)).index_add_(0, data["batch"], atoms)
        values = {
            "teacher_energy": energy,
            "teacher_forces": output["forces"],
            "per_atom_energy": atoms - references[data["atomic_numbers"]],
            "teacher_virial": output["virials"].detach().double(),
        }
        for name in fields:
            if name not in values:
                channels = self._channels[name]
                layer = layers.get(name) or list(channels)[-1]
                values[name] = channels[layer].of(states[layer])
        return values

    def _input(self, graphs: Sequence[SampleGraph]) -> dict[str, Tensor]:
        """Return a batch as MACE reads it: shifts belong to the target of an edge."""
        dtype = self.model.r_max.dtype
        structures = [graph.structure for graph in graphs]
        batch = collate(structures, [graph.edges for graph in graphs], torch.float64)
        owner = batch.batch[batch.edge_index[0]]
        shifts = torch.einsum("ei,eij->ej", batch.cell_offsets, batch.cell[owner])
        known = self.model.atomic_numbers.cpu()
        kind = (batch.atomic_numbers[:, None] == known).to(dtype)
        ends = torch.cat((batch.natoms.new_zeros(1), batch.natoms.cumsum(0)))
        data = {
            "positions": batch.positions.to(dtype),
            "node_attrs": kind,
            "edge_index": batch.edge_index,
            "shifts": -shifts.to(dtype),
            "unit_shifts": -batch.cell_offsets.to(dtype),
            "cell": batch.cell.reshape(-1, 3).to(dtype),
            "batch": batch.batch,
            "ptr": ends,
            "head": torch.full((len(graphs),), self.head),
            "atomic_numbers": batch.atomic_numbers,
        }
        return {name: tensor.to(self._device) for name, tensor in data.items()}


def _normalizer(model: Any, head: int) -> Normalizer:
    """Energies of isolated atoms with the model's shift, and its scale, in eV."""
    energies = np.atleast_2d(model.atomic_energies_fn.atomic_energies.double().numpy())
    scale, shift = 1.0, 0.0
    if hasattr(model, "scale_shift"):
        scale = float(torch.atleast_1d(model.scale_shift.scale)[head])
        shift = float(torch.atleast_1d(model.scale_shift.shift)[head])
    references = np.zeros(NUM_REFERENCES)
    references[model.atomic_numbers.tolist()] = energies[head] + shift
    return Normalizer(0.0, scale, scale, tuple(references.tolist()))
