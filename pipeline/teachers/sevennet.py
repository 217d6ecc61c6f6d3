"""SevenNet as teacher; package ``sevenn``, whose wheel holds the weights of 7net-0.

Options: ``pretrained`` (default ``7net-0``; only without a checkpoint), ``modal`` for
models of several kinds of data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.errors import SpecError
from pipeline.files.atomic import sha256_of
from pipeline.graphs.neighbors import NeighborSpec
from pipeline.models.normalizer import NUM_REFERENCES, Normalizer
from pipeline.spec.sections import TeacherSpec
from pipeline.structure import Sample
from pipeline.teachers.batch import collate_graphs, structure_edge_vectors
from pipeline.teachers.capture import capture_outputs
from pipeline.teachers.irreps import Channels, invariants, vectors
from pipeline.teachers.potential import FieldInfo, Guarantees, Potential, SampleGraph
from pipeline.teachers.trust import NUMPY_ARRAYS, check_options, refuse_code

OPTIONS = {"pretrained": "7net-0", "modal": None}
# A pass with gradients keeps each number of a convolution about so often, as float32.
_KEPT = 2.5
# Their order of six components: xx yy zz xy yz zx.
_VOIGT = [[0, 3, 5], [3, 1, 4], [5, 4, 2]]


def load(spec: TeacherSpec) -> "SevenNet":
    """The SevenNet of a file, or of the package where no file is named.

    Raises
    ------
    SpecError
        An option is unknown, or the weights are not in the package.
    CheckpointError
        The file holds more than tensors and plain values.
    """
    from sevenn.util import load_checkpoint

    options = check_options(spec, OPTIONS)
    path = Path(spec.checkpoint or _find_shipped(options["pretrained"]))
    # Their loader unpickles anything, so nothing but numbers may be in the file.
    refuse_code(path, NUMPY_ARRAYS)
    checkpoint = load_checkpoint(path)
    model = checkpoint.build_model().eval().requires_grad_(False)
    modal = _modal(model, options["modal"])
    normalizer = _normalizer(checkpoint.config, modal)
    return SevenNet(model, normalizer, modal, sha256_of(path), path.name)


def _find_shipped(name: str) -> Path:
    """Return the file of weights called ``name`` in the package; downloads nothing."""
    from sevenn import _const

    files = {
        "7net-0": _const.SEVENNET_0_11Jul2024,
        "7net-0_22may2024": _const.SEVENNET_0_22May2024,
        "7net-l3i5": _const.SEVENNET_l3i5,
        "7net-mf-0": _const.SEVENNET_MF_0,
    }
    path = Path(files.get(name, ""))
    if not path.is_file():
        raise SpecError(
            f"teacher.options.pretrained: {name!r} is not among the weights that ship "
            f"with sevenn ({', '.join(files)}); name a file as teacher.checkpoint."
        )
    return path


def _modal(model: Any, wanted: str | None) -> str | None:
    known = list(model.modal_map or ())
    if wanted not in (known or [None]):
        raise SpecError(
            f"teacher.options.modal is {wanted!r}; this SevenNet offers "
            f"{', '.join(known) or 'no choice'}."
        )
    return wanted


def _normalizer(config: Mapping[str, Any], modal: str | None) -> Normalizer:
    """Shift by element and scale of the checkpoint, in eV."""
    shift, scale = (
        part[modal] if isinstance(part := config[key], dict) else part
        for key in ("shift", "scale")
    )
    by_element = np.broadcast_to(np.asarray(shift, np.float64), (NUM_REFERENCES,))
    known = sorted(config["_type_map"])
    scales = np.broadcast_to(np.asarray(scale, np.float64), (NUM_REFERENCES,))[known]
    mean = float(scales.mean())
    references = np.zeros(NUM_REFERENCES)
    references[known] = by_element[known]
    return Normalizer(0.0, mean, mean, tuple(references.tolist()))


class SevenNet(Potential):
    """A SevenNet with its scale; layers ``block<k>`` are the states after block k.

    The last block has invariant channels only, so vectors come from the block before.
    Without parity (7net-0) what is called a vector may be mirrored wrongly.
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        normalizer: Normalizer,
        modal: str | None,
        sha256: str,
        file: str,
    ) -> None:
        self.model = model
        self.normalizer = normalizer
        self.modal = modal
        self._sha256 = sha256
        self._gates: dict[str, Any] = {
            f"block{int(name.split('_')[0]) + 1}": module
            for name, module in model.named_children()
            if name.endswith("_equivariant_gate")
        }
        irreps = {n: str(gate.gate.irreps_out) for n, gate in self._gates.items()}
        self._invariants = {n: invariants(text) for n, text in irreps.items()}
        self._vectors = {n: v for n, t in irreps.items() if (v := vectors(t)).count}
        self.available_fields = _available_fields(self._invariants, self._vectors)
        self.graph_rule = NeighborSpec(
            float(self.model.cutoff), max_neighbors=2**31, symmetric=False
        )
        self.elements = set(self.model.type_map)
        has_parity = any("o" in text for text in irreps.values())
        self.guarantees = Guarantees(reflections=has_parity)
        self.has_virial = True
        self.provenance = {"package": f"sevenn {version('sevenn')}", "file": file}
        self._device = torch.device("cpu")

    @property
    def identity(self) -> dict[str, Any]:
        """The hash of the file, and which kind of data it imitates."""
        return {"checkpoint_sha256": self._sha256, "modal": self.modal}

    def to(self, device: torch.device) -> None:
        """Move the model to ``device``."""
        self.model.to(device)
        self._device = device

    def graph(self, sample: Sample) -> SampleGraph:
        """The sample with its edge vectors, (E, 3) float32 in Å."""
        return _with_vectors(super().graph(sample))

    def with_positions(
        self, graph: SampleGraph, positions: npt.NDArray[np.float64]
    ) -> SampleGraph:
        """Return ``graph`` with other ``positions`` (N, 3) in Å and the same edges."""
        return _with_vectors(super().with_positions(graph, positions))

    def estimate_memory(self, graph: SampleGraph) -> int:
        """Bytes of the messages and filters of all convolutions, measured on CPUs."""
        sizes = [
            module.convolution.weight_numel
            + module.convolution.irreps_in1.dim
            + module.convolution.irreps_out.dim
            for name, module in self.model.named_children()
            if name.endswith("_convolution")
        ]
        return int(_KEPT * 4 * sum(sizes) * len(graph.edges))

    def forward(
        self,
        graphs: Sequence[SampleGraph],
        fields: Sequence[str],
        layers: Mapping[str, str],
    ) -> Mapping[str, Tensor]:
        """Energies are summed over atoms in double precision."""
        import sevenn._keys as key

        batch = collate_graphs(graphs, self._device)
        data = self._input(graphs, batch)
        with (
            torch.enable_grad(),
            capture_outputs(self._gates, lambda out: out[key.NODE_FEATURE]) as states,
        ):
            output = self.model(data)
        atoms = output[key.ATOMIC_ENERGY].detach().reshape(-1).double()
        energy = batch.sum_atoms(atoms)
        references = torch.tensor(
            self.normalizer.element_references, dtype=atoms.dtype, device=atoms.device
        )
        values = {
            "teacher_energy": energy,
            "teacher_forces": output[key.PRED_FORCE],
            "per_atom_energy": atoms - references[batch.atomic_numbers],
            # Their stress is minus the usual one; with a volume of one, a virial.
            "teacher_virial": output[key.PRED_STRESS].double()[:, _VOIGT],
        }
        for name in fields:
            if name not in values:
                values[name] = self._hidden(name, layers.get(name), states)
        return values

    def _input(self, graphs: Sequence[SampleGraph], batch: Any) -> Any:
        """Return a batch as SevenNet reads it: its first row of edges are targets."""
        import sevenn._keys as key
        from sevenn.atom_graph_data import AtomGraphData

        towards_source = np.concatenate([graph.extra for graph in graphs])
        content = {
            key.NODE_FEATURE: batch.atomic_numbers,
            key.ATOMIC_NUMBERS: batch.atomic_numbers,
            key.EDGE_IDX: batch.edge_index.flip(0),
            key.EDGE_VEC: torch.from_numpy(towards_source).to(self._device),
            # A volume of one, so that their stress is a virial.
            key.CELL_VOLUME: torch.ones(len(graphs), device=self._device),
            key.NUM_ATOMS: batch.n_atoms,
            key.BATCH: batch.batch,
        }
        if self.modal is not None:
            content[key.DATA_MODALITY] = [self.modal] * len(graphs)
        return AtomGraphData(**content)

    def _hidden(
        self, name: str, layer: str | None, states: Mapping[str, Tensor]
    ) -> Tensor:
        if name == "node_features":
            layer = layer or list(self._invariants)[-1]
            return self._invariants[layer].of(states[layer])
        layer = layer or list(self._vectors)[-1]
        return self._vectors[layer].of(states[layer])


def _with_vectors(graph: SampleGraph) -> SampleGraph:
    towards_source = structure_edge_vectors(graph.structure, graph.edges)
    return replace(graph, extra=towards_source.astype(np.float32))


def _available_fields(
    invariants: Mapping[str, Channels], vectors: Mapping[str, Channels]
) -> dict[str, FieldInfo]:
    available_fields = {"per_atom_energy": FieldInfo("per_atom_energy", 0)}
    for name, channels in (("node_features", invariants), ("vector_features", vectors)):
        layers = {layer: one.count for layer, one in channels.items()}
        if layers:
            available_fields[name] = FieldInfo(name, list(layers.values())[-1], layers)
    return available_fields
