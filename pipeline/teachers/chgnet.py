"""CHGNet as teacher; package ``chgnet``, whose wheel holds the weights.

Option: ``pretrained`` (``0.3.0``, the default, ``0.2.0`` or ``r2scan``; only without a
checkpoint).
"""

import contextlib
import copy
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError, SpecError
from pipeline.files.atomic import sha256_of
from pipeline.graphs.neighbors import Edges, NeighborSpec
from pipeline.models.normalizer import NUM_REFERENCES, Normalizer
from pipeline.spec.sections import TeacherSpec
from pipeline.structure import Sample, Structure
from pipeline.teachers.batch import collate_graphs, structure_edge_vectors
from pipeline.teachers.capture import capture_outputs
from pipeline.teachers.potential import FieldInfo, Potential, SampleGraph
from pipeline.teachers.trust import check_options, refuse_code

OPTIONS = {"pretrained": "0.3.0"}
# A pass with gradients takes about so much (64 channels, measured on CPUs).
_BYTES_PER_EDGE, _BYTES_PER_ANGLE = 16_000, 18_000
_FILES = {
    "0.3.0": "0.3.0/chgnet_0.3.0_e29f68s314m37.pth.tar",
    "0.2.0": "0.2.0/chgnet_0.2.0_e30f77s348m32.pth.tar",
    "r2scan": "r2scan/chgnet_r2scan_transfer_learning_e15f36s161m23.pth.tar",
}


def load(spec: TeacherSpec) -> "ChgNet":
    """The CHGNet of a file, or of the package where no file is named.

    Raises
    ------
    SpecError
        An option is unknown.
    CheckpointError
        The file holds more than tensors and plain values, or another kind of model.
    """
    import chgnet.model
    from chgnet.model import CHGNet

    options = check_options(spec, OPTIONS)
    name = options["pretrained"]
    if name not in _FILES:
        raise SpecError(
            f"teacher.options.pretrained: {name!r} is not among the weights that ship "
            f"with chgnet ({', '.join(_FILES)})."
        )
    shipped = Path(chgnet.model.__file__).parents[1] / "pretrained" / _FILES[name]
    path = shipped if spec.checkpoint is None else Path(spec.checkpoint)
    # Their loader unpickles anything, so nothing but numbers may be in the file.
    refuse_code(path)
    own = name if spec.checkpoint is None else None
    # They announce every model on standard output. The old model has one more bias.
    with contextlib.redirect_stdout(io.StringIO()):
        model = CHGNet.from_file(str(path), version=own, mlp_out_bias=own == "0.2.0")
    if not (model.mlp_first and model.is_intensive):
        raise CheckpointError(f"{path} holds a CHGNet without energies per site.")
    return ChgNet(model.eval().requires_grad_(False), sha256_of(path), path.name)


class ChgNet(Potential):
    """A CHGNet with its reference energies; layers ``block<k>`` follow block k.

    Node states default to what the final network reads, edge states to those after the
    last update of bonds. Both directions of a bond share one state.
    """

    model: Any

    def __init__(self, model: nn.Module, sha256: str, file: str) -> None:
        self.model = model
        self._sha256 = sha256
        self.normalizer = _normalizer(self.model.composition_model)
        atoms, bonds = self.model.atom_conv_layers, self.model.bond_conv_layers
        self._atom_blocks = {f"block{k}": m for k, m in enumerate(atoms, 1)}
        self._bond_blocks = {f"block{k}": m for k, m in enumerate(bonds, 1)}
        self.available_fields = self._list_fields()
        converter = self.model.graph_converter
        self._short = float(converter.bond_graph_cutoff)
        # Without a limit; bonds need both of their directions.
        self.graph_rule = NeighborSpec(
            float(converter.atom_graph_cutoff), max_neighbors=2**31, symmetric=True
        )
        self.elements = range(1, self.model.atom_embedding.embedding.num_embeddings + 1)
        self.provenance = {"package": f"chgnet {version('chgnet')}", "file": file}
        self.has_virial = True
        self._device = torch.device("cpu")

    def _list_fields(self) -> dict[str, FieldInfo]:
        wide = self.model.atom_fea_dim
        bond = self.model.bond_fea_dim
        blocks = dict.fromkeys(self._bond_blocks, bond)
        return {
            "per_atom_energy": FieldInfo("per_atom_energy", 0),
            "node_features": FieldInfo(
                "node_features", wide, dict.fromkeys(self._atom_blocks, wide)
            ),
            "edge_features": FieldInfo("edge_features", bond, blocks),
            "edge_to_node_features": FieldInfo("edge_to_node_features", bond, blocks),
        }

    @property
    def identity(self) -> dict[str, Any]:
        """The hash of the file."""
        return {"checkpoint_sha256": self._sha256}

    def to(self, device: torch.device) -> None:
        """Move the model to ``device``."""
        self.model.to(device)
        self._device = device

    def graph(self, sample: Sample) -> SampleGraph:
        """The sample with its bonds and angles."""
        graph = super().graph(sample)
        bonds = _Bonds(graph.structure, graph.edges, self._short)
        return replace(graph, extra=bonds)

    def with_positions(
        self, graph: SampleGraph, positions: npt.NDArray[np.float64]
    ) -> SampleGraph:
        """Return ``graph`` with other ``positions``, the same bonds and angles."""
        moved = super().with_positions(graph, positions)
        return replace(moved, extra=graph.extra.moved(positions))

    def estimate_memory(self, graph: SampleGraph) -> int:
        """Bytes of the states of edges and angles in a pass with gradients."""
        angles = len(graph.extra.angles)
        return _BYTES_PER_EDGE * len(graph.edges) + _BYTES_PER_ANGLE * angles

    def forward(
        self,
        graphs: Sequence[SampleGraph],
        fields: Sequence[str],
        layers: Mapping[str, str],
    ) -> Mapping[str, Tensor]:
        """Energies are summed over atoms in double precision."""
        batch = collate_graphs(graphs, self._device)
        crystals = [self._crystal(graph) for graph in graphs]
        with torch.enable_grad(), capture_outputs(self._modules()) as states:
            energy = self.model(crystals, task="e")["e"]
            # They give energies per atom.
            places = [crystal.atom_frac_coord for crystal in crystals]
            lattices = [crystal.lattice for crystal in crystals]
            found = torch.autograd.grad(
                (energy * batch.n_atoms).sum(), [*places, *lattices]
            )
        slopes, by_lattice = found[: len(graphs)], found[len(graphs) :]
        atoms = states["energies"].detach().reshape(-1).double()
        forces = [
            -slope @ torch.from_numpy(graph.extra.to_cartesian).to(slope)
            for slope, graph in zip(slopes, graphs, strict=True)
        ]
        references = torch.tensor(
            self.normalizer.element_references, dtype=atoms.dtype, device=atoms.device
        )
        values = {
            "teacher_energy": batch.sum_atoms(atoms + references[batch.atomic_numbers]),
            "teacher_forces": torch.cat(forces),
            "per_atom_energy": atoms,
            "teacher_virial": torch.stack(list(map(_virial, lattices, by_lattice))),
        }
        for name in fields:
            if name not in values:
                values[name] = self._hidden(name, layers.get(name), states, graphs)
        return values

    def _modules(self) -> dict[str, nn.Module]:
        modules = {"energies": self.model.mlp, "bonds": self.model.bond_embedding}
        modules |= {f"atoms {k}": module for k, module in self._atom_blocks.items()}
        modules |= {f"bonds {k}": module for k, module in self._bond_blocks.items()}
        if self.model.readout_norm is not None:
            modules["atoms"] = self.model.readout_norm
        return modules

    def _hidden(
        self,
        name: str,
        layer: str | None,
        states: Mapping[str, Tensor],
        graphs: Sequence[SampleGraph],
    ) -> Tensor:
        if name == "node_features":
            last = f"atoms {list(self._atom_blocks)[-1]}"
            key = f"atoms {layer}" if layer else "atoms"
            return states[key if key in states else last]
        # Bonds stay as embedded where no structure of the batch has an angle.
        key = f"bonds {layer or list(self._bond_blocks)[-1]}"
        bonds = states[key if key in states else "bonds"]
        edges = bonds[torch.from_numpy(_shifted_bonds(graphs)).to(bonds.device)]
        if name == "edge_features":
            return edges
        batch = collate_graphs(graphs, self._device)
        sums = edges.new_zeros(len(batch.batch), edges.shape[1])
        return sums.index_add_(0, batch.edge_index[1], edges)

    def _crystal(self, graph: SampleGraph) -> Any:
        """Return the graph as CHGNet reads it; centres are targets."""
        from chgnet.graph import CrystalGraph

        bonds: _Bonds = graph.extra
        structure, edges = graph.structure, graph.edges

        def integers(values: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(values.astype(np.int32)).to(self._device)

        def numbers(values: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(values.astype(np.float32)).to(self._device)

        return CrystalGraph(
            atomic_number=integers(structure.atomic_numbers),
            atom_frac_coord=numbers(bonds.fractional).requires_grad_(True),
            atom_graph=integers(edges.edge_index[::-1].T.copy()),
            atom_graph_cutoff=self.graph_rule.cutoff,
            neighbor_image=numbers(edges.cell_offsets),
            directed2undirected=integers(bonds.bond_of_edge),
            undirected2directed=integers(bonds.edge_of_bond),
            bond_graph=integers(bonds.angles),
            bond_graph_cutoff=self._short,
            lattice=numbers(bonds.lattice).requires_grad_(True),
        )


def _virial(lattice: Tensor, slope: Tensor) -> Tensor:
    """Minus dE/dε, (3, 3), of dE/dL with rows of L as vectors: a strain makes it L·ε.

    Fractional coordinates stay, so atoms move along.
    """
    by_strain = lattice.detach().double().mT @ slope.double()
    return -(by_strain + by_strain.mT) / 2


class _Bonds:
    """A structure's edges paired into bonds, and the angles between short ones.

    ``bond_of_edge`` (E,), ``edge_of_bond`` (E/2,) its first edge, ``angles`` (A, 5)
    rows centre, bond, edge, other bond, other edge; ``lattice`` (3, 3) in Å has full
    rank, ``fractional`` (N, 3) are positions in it, and slopes in fractional
    coordinates times ``to_cartesian`` (3, 3) are those in Å.
    """

    def __init__(self, structure: Structure, edges: Edges, short: float) -> None:
        from ase.geometry import complete_cell

        self.lattice = complete_cell(structure.cell * structure.pbc[:, None])
        inverse = np.linalg.inv(self.lattice)
        self.fractional = structure.positions @ inverse
        self.to_cartesian = inverse.T.copy()
        first = np.minimum(np.arange(len(edges)), _mirrors(edges))
        self.edge_of_bond, self.bond_of_edge = np.unique(first, return_inverse=True)
        length = np.linalg.norm(structure_edge_vectors(structure, edges), axis=1)
        one, other = _pairs_of_equal(
            edges.edge_index[1], np.flatnonzero(length < short)
        )
        bond = self.bond_of_edge
        self.angles = np.column_stack(
            (edges.edge_index[1][one], bond[one], one, bond[other], other)
        )

    def moved(self, positions: npt.NDArray[np.float64]) -> "_Bonds":
        """Return the same bonds and angles for other ``positions`` (N, 3) in Å."""
        other = copy.copy(self)
        other.fractional = positions @ np.linalg.inv(self.lattice)
        return other


def _mirrors(edges: Edges) -> npt.NDArray[np.int64]:
    """Return the number of every edge's opposite; edges are sorted and have theirs."""
    source, target = edges.edge_index
    # Sorted as edges are: by target, source, shift, of the opposite edge.
    order = np.lexsort((*(-edges.cell_offsets.T)[::-1], target, source))
    mirrors = np.empty(len(edges), np.int64)
    mirrors[order] = np.arange(len(edges))
    return mirrors


def _pairs_of_equal(
    centre: npt.NDArray[np.int64], chosen: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ordered pairs of different ``chosen`` edges, ascending, that share a centre."""
    degree = np.bincount(centre[chosen], minlength=1)
    first = np.cumsum(degree) - degree
    mine = degree[centre[chosen]]
    one = np.repeat(np.arange(len(chosen)), mine)
    within = np.arange(len(one)) - np.repeat(np.cumsum(mine) - mine, mine)
    other = first[centre[chosen[one]]] + within
    kept = one != other
    return chosen[one[kept]], chosen[other[kept]]


def _shifted_bonds(graphs: Sequence[SampleGraph]) -> npt.NDArray[np.int64]:
    """Bond of every edge of a batch, bonds numbered over the batch."""
    counts = np.array([len(graph.extra.edge_of_bond) for graph in graphs])
    first = np.cumsum(counts) - counts
    return np.concatenate(
        [g.extra.bond_of_edge + at for g, at in zip(graphs, first, strict=True)]
    )


def _normalizer(composition_model: Any) -> Normalizer:
    """Energies in eV over CHGNet's reference energies by element."""
    references = np.zeros(NUM_REFERENCES)
    if composition_model is not None:
        weights = composition_model.fc.weight.detach().reshape(-1).double().numpy()
        references[1 : len(weights) + 1] = weights
    return Normalizer(element_references=tuple(references.tolist()))
