"""UMA and other potentials of fairchem 2 as teachers; package ``fairchem-core``.

Files are pickled checkpoints. Options: ``trust_pickle: true``, without which no file is
opened, ``task`` (the kind of data that the model imitates: ``oc20``, ``omol``, ...),
``charge`` and ``spin`` of every structure (defaults: 0 and 0, of ``omol`` 0 and 1).
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import SpecError
from pipeline.files.atomic import sha256_of
from pipeline.graphs.neighbors import NeighborSpec
from pipeline.models.normalizer import NUM_REFERENCES, Normalizer
from pipeline.spec.sections import TeacherSpec
from pipeline.teachers.capture import capture_outputs
from pipeline.teachers.potential import FieldInfo, Guarantees, Potential, SampleGraph
from pipeline.teachers.trust import check_options, require_trust

OPTIONS = {"trust_pickle": False, "task": None, "charge": 0, "spin": None}


def load(spec: TeacherSpec) -> "Fairchem":
    """The potential in ``spec.checkpoint``.

    Raises
    ------
    SpecError
        No file is named, its owner does not vouch for it, or the task is unknown.
    """
    options = check_options(spec, OPTIONS)
    if spec.checkpoint is None:
        raise SpecError("teacher.checkpoint is missing; fairchem needs a file.")
    require_trust(spec)
    unit = _unit(Path(spec.checkpoint), "cpu")
    task = options["task"]
    if task not in unit.dataset_to_tasks:
        raise SpecError(
            f"teacher.options.task is {task!r}; this model offers "
            f"{', '.join(unit.dataset_to_tasks)}."
        )
    if options["spin"] is None:
        options["spin"] = int(task == "omol")
    return Fairchem(unit, Path(spec.checkpoint), options)


def _unit(path: Path, device: str) -> Any:
    """Load in single precision, on edges that we give, without merging experts."""
    from fairchem.core.units.mlip_unit import InferenceSettings, load_predict_unit

    settings = InferenceSettings(
        activation_checkpointing=False,
        external_graph_gen=True,
        auto_add_default_untrained_tasks=False,
    )
    return load_predict_unit(path, inference_settings=settings, device=device)


class Fairchem(Potential):
    """A backbone of fairchem with the head of one task; ``block<k>`` follow layer k.

    States are spherical: degree 0 gives the invariants, degree 1 the vectors.
    """

    precisions = ("float32",)

    def __init__(self, unit: Any, path: Path, options: Mapping[str, Any]) -> None:
        self._unit = unit
        self._path = path
        self._options = {k: options[k] for k in ("task", "charge", "spin")}
        self._sha256 = sha256_of(path)
        backbone = unit.model.module.backbone
        self.available_fields = _available_fields(
            backbone, len(_energy_blocks(unit.model.module)) == 1
        )
        self.graph_rule = NeighborSpec(
            float(backbone.cutoff), int(backbone.max_neighbors), symmetric=False
        )
        self.elements = range(1, int(backbone.max_num_elements))
        self.normalizer = _normalizer(unit.dataset_to_tasks[options["task"]])
        # Its convolutions are made for rotations only; mirrored, vectors differ.
        self.guarantees = Guarantees(
            reflections=False,
            sum_of_atoms="per_atom_energy" in self.available_fields,
            gradient_forces=not backbone.regress_config.direct_forces,
        )
        properties = {task.property for task in unit.dataset_to_tasks[options["task"]]}
        self.has_virial = "stress" in properties
        self.provenance = {
            "package": f"fairchem-core {version('fairchem-core')}",
            "file": path.name,
        }

    @property
    def identity(self) -> dict[str, Any]:
        """The hash of the file, and what the model is told of every structure."""
        return {"checkpoint_sha256": self._sha256, **self._options}

    def to(self, device: torch.device) -> None:
        """Load the file again where it is for another kind of device."""
        if device.type != str(self._unit.device).partition(":")[0]:
            self._unit = _unit(self._path, device.type)

    def forward(
        self,
        graphs: Sequence[SampleGraph],
        fields: Sequence[str],
        layers: Mapping[str, str],
    ) -> Mapping[str, Tensor]:
        """Fields in eV and Å; hidden states as the final network reads them."""
        from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch

        batch = atomicdata_list_to_batch([self._input(graph) for graph in graphs])
        model = self._unit.model.module
        blocks = {f"block{k}": m for k, m in enumerate(model.backbone.blocks, 1)}
        final = {"final": model.backbone}
        heads = {f"head{k}": m for k, m in enumerate(_energy_blocks(model))}
        with (
            torch.enable_grad(),
            capture_outputs(blocks) as states,
            capture_outputs(final, lambda out: out["node_embedding"]) as last,
            capture_outputs(heads) as energies,
        ):
            output = self._unit.predict(batch)
        values = {
            "teacher_energy": output["energy"].detach().double(),
            "teacher_forces": output["forces"],
        }
        if self.has_virial:
            values["teacher_virial"] = torch.stack(
                _virials(graphs, output["forces"], output["stress"])
            )
        if "per_atom_energy" in fields:
            atoms = energies["head0"].detach().reshape(-1)
            values["per_atom_energy"] = atoms * self.normalizer.energy_std
        spheres = {**states, **last}
        for name in fields:
            if name not in values:
                sphere = spheres[layers.get(name, "final")]
                vector = name == "vector_features"
                values[name] = sphere[:, 1:4] if vector else sphere[:, 0]
        return values

    def _input(self, graph: SampleGraph) -> Any:
        """Return one structure with our edges as fairchem reads it."""
        from fairchem.core.datasets.atomic_data import AtomicData

        structure, edges = graph.structure, graph.edges
        count = len(structure)
        numbers = structure.atomic_numbers.astype(np.int64)
        return AtomicData(
            pos=torch.from_numpy(structure.positions.astype(np.float32)),
            atomic_numbers=torch.from_numpy(numbers),
            cell=torch.from_numpy(structure.cell.astype(np.float32)).view(1, 3, 3),
            pbc=torch.from_numpy(structure.pbc.copy()).view(1, 3),
            natoms=torch.tensor([count]),
            edge_index=torch.from_numpy(edges.edge_index),
            cell_offsets=torch.from_numpy(edges.cell_offsets.astype(np.float32)),
            nedges=torch.tensor([len(edges)]),
            charge=torch.tensor([self._options["charge"]]),
            spin=torch.tensor([self._options["spin"]]),
            fixed=torch.zeros(count, dtype=torch.int64),
            tags=torch.from_numpy(structure.tags.astype(np.int64)),
            dataset=self._options["task"],
        )


def _virials(
    graphs: Sequence[SampleGraph], forces: Tensor, stresses: Tensor
) -> list[Tensor]:
    """Virials (3, 3) in eV of stresses in eV/Å³, or of forces where nothing repeats.

    A molecule has no volume, and its virial is the sum of positions times forces.
    """
    found, row = [], 0
    for graph, stress in zip(graphs, stresses.detach().double(), strict=True):
        structure = graph.structure
        rows = slice(row, row := row + len(structure))
        if structure.pbc.any():
            volume = float(abs(np.linalg.det(structure.cell)))
            virial = -volume * stress.reshape(3, 3)
        else:
            positions = torch.from_numpy(structure.positions).to(stress)
            virial = positions.mT @ forces[rows].detach().to(stress)
        found.append((virial + virial.mT) / 2)
    return found


def _energy_blocks(model: Any) -> list[nn.Module]:
    """Return the networks that give energies per atom, of heads that add them up."""
    return [
        head.energy_block
        for head in model.output_heads.modules()
        if hasattr(head, "energy_block") and head.reduce == "sum"
    ]


def _available_fields(backbone: Any, energies: bool) -> dict[str, FieldInfo]:
    width = int(backbone.sphere_channels)
    layers = {f"block{k}": width for k in range(1, len(backbone.blocks) + 1)}
    names = ["node_features", "vector_features"][: 1 + (backbone.lmax > 0)]
    available_fields = {name: FieldInfo(name, width, layers) for name in names}
    if energies:
        available_fields["per_atom_energy"] = FieldInfo("per_atom_energy", 0)
    return available_fields


def _normalizer(tasks: Sequence[Any]) -> Normalizer:
    """Mean, scales and references of a task's energy and forces, in eV and eV/Å."""
    by_property = {task.property: task for task in tasks}
    energy, forces = by_property["energy"], by_property["forces"]
    references = np.zeros(NUM_REFERENCES)
    if energy.element_references is not None:
        known = energy.element_references.element_references.double().numpy()
        count = min(len(known), NUM_REFERENCES)
        references[:count] = known[:count]
    return Normalizer(
        float(energy.normalizer.mean),
        float(energy.normalizer.rmsd),
        float(forces.normalizer.rmsd),
        tuple(references.tolist()),
    )
