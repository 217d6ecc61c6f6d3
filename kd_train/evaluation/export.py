"""A finished student as a program of ``torch.export``: tensors in, eV and eV/Å out.

PaiNN and SchNet, with direct forces or with forces that are gradients. GemNet-OC cannot
be exported: how many edges meet at an atom decides the shapes of its tables.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch_geometric.data import Data

from kd_train.evaluation.load_student import predict_consistently
from pipeline.errors import CheckpointError
from pipeline.files.atomic import write_atomically
from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import sample_edges
from pipeline.models.checkpoint import LoadedModel
from pipeline.models.elements import trained_elements
from pipeline.models.layers import edge_vectors
from pipeline.structure import Structure

EXPORTABLE = ("painn", "schnet")
HEADER = "kd_train.json"
INPUTS = ("atomic_numbers", "positions", "edge_index", "shifts", "natoms")
# Largest deviation from the model, relative to the largest number of its kind.
TOLERANCE = 1e-4


class TensorModel(nn.Module):
    """A student on plain tensors, its results in eV and eV/Å.

    Its pass makes no choice that depends on numbers, so that it can be recorded.
    """

    def __init__(self, student: LoadedModel) -> None:
        super().__init__()
        self.student = student
        self.model = student.model

    def forward(
        self,
        atomic_numbers: Tensor,
        positions: Tensor,
        edge_index: Tensor,
        shifts: Tensor,
        natoms: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return energies (B,) float64 in eV, and forces (N, 3) and virials (B, 3, 3).

        Forces are left out if the model has none, virials (eV) if forces are direct.

        ``atomic_numbers`` (N,) int64, ``positions`` (N, 3) float32 in Å, ``edge_index``
        (2, E) int64 from source to target, ``shifts`` (E, 3) float32 in Å, what the
        source image is away from the source (``cell_offsets @ cell``), ``natoms`` (B,)
        int64, atoms of each sample.
        """
        samples, atoms = natoms.shape[0], positions.shape[0]
        numbers = torch.arange(samples, device=natoms.device)
        batch = torch.repeat_interleave(numbers, natoms, output_size=atoms)
        cell = torch.eye(3, dtype=positions.dtype, device=positions.device)
        data = Data(
            atomic_numbers=atomic_numbers,
            positions=positions,
            edge_index=edge_index,
            # In a cell of unit vectors, shifts in Å are shifts in cells.
            cell_offsets=shifts,
            cell=cell.expand(samples, 3, 3),
            batch=batch,
            natoms=natoms,
            num_nodes=atoms,
            num_graphs=samples,
            recorded=True,
        )
        return tuple(predict_consistently(self.student, data).present().values())


def tensor_inputs(batch: Data) -> tuple[Tensor, ...]:
    """Return the inputs of an exported program for a collated batch."""
    # What is left of the edge vectors without the positions.
    shifts = edge_vectors(batch, torch.zeros_like(batch.positions))
    return (
        batch.atomic_numbers,
        batch.positions,
        batch.edge_index,
        shifts,
        batch.natoms,
    )


def export_student(student: LoadedModel, path: Path) -> dict[str, float]:
    """Write ``student`` to ``path`` (.pt2) and return its deviations from the model.

    The numbers of atoms, edges and samples are variable. The program is read again and
    compared with the model on two batches of other sizes, one of them periodic if the
    model is. Returns the largest deviations of energies (eV), forces (eV/Å) and, if
    forces are gradients, virials (eV).

    Raises
    ------
    CheckpointError
        The model cannot be exported, or the program computes something else.
    """
    if student.name not in EXPORTABLE:
        raise CheckpointError(
            f"A {student.name} cannot be exported; export {' or '.join(EXPORTABLE)}, "
            "or use StudentCalculator or load_student of kd_train."
        )
    buffer = io.BytesIO()
    program = export_program(student)
    torch.export.save(program, buffer, extra_files={HEADER: _header(student)})
    content = buffer.getvalue()
    worst = compare_program(student, content)
    write_atomically(path, content)
    return worst


def export_program(student: LoadedModel) -> ExportedProgram:
    """Export ``student`` as a program on its device."""
    # Equal sizes would be taken for one: the numbers of samples, atoms and edges here
    # differ from each other and from the 2 and 3 of other axes.
    inputs = tensor_inputs(example_batch(student, [4, 7, 5, 6, 9], periodic=False))
    # Recorded first, since torch.export itself takes no gradients.
    record = make_fx(
        TensorModel(student), tracing_mode="symbolic", _allow_non_fake_inputs=True
    )
    recorded = record(*inputs)
    atoms, edges, samples = Dim("atoms"), Dim("edges"), Dim("samples")
    shapes = ({0: atoms}, {0: atoms}, {1: edges}, {0: edges}, {0: samples})
    return torch.export.export(recorded, inputs, dynamic_shapes=shapes)


def compare_program(student: LoadedModel, content: bytes) -> dict[str, float]:
    """Return the largest deviations of the program in ``content`` from ``student``.

    Raises
    ------
    CheckpointError
        They are more than rounding.
    """
    program = torch.export.load(io.BytesIO(content)).module()
    worst = dict.fromkeys(("energy", "forces"), 0.0)
    cell = student.model.graph_rule.periodic
    for natoms, periodic in (([8], cell), ([3, 12, 5, 2, 6, 10, 4], False)):
        batch = example_batch(student, natoms, periodic)
        results = program(*tensor_inputs(batch))
        expected = predict_consistently(student, batch).present()
        for found, (name, wanted) in zip(results, expected.items(), strict=True):
            deviation = float((found - wanted).abs().max())
            if not deviation <= TOLERANCE * float(wanted.abs().max().clamp(min=1.0)):
                raise CheckpointError(
                    "The exported program differs from the model on a batch of "
                    f"{len(natoms)} samples: its {name} deviates by up to "
                    f"{deviation:.2g}; no file was written."
                )
            worst[name] = max(worst.get(name, 0.0), deviation)
    return worst


def _header(student: LoadedModel) -> str:
    """Describe the program for its users, as JSON."""
    rule = student.model.graph_rule
    example = example_batch(student, [2], periodic=False)
    known = trained_elements(student.normalizer, student.provenance)
    return json.dumps(
        {
            "model": student.name,
            "inputs": INPUTS,
            "outputs": list(predict_consistently(student, example).present()),
            "hyperparameters": student.model.hyperparameters,
            "normalizer": student.normalizer.to_dict(),
            "elements": None if known is None else sorted(known),
            "graph": {
                "cutoff": rule.cutoff,
                "max_neighbors": rule.max_neighbors,
                "symmetric": rule.symmetric,
                "periodic": rule.periodic,
            },
            "provenance": student.provenance,
            "sha256": student.sha256,
        },
        sort_keys=True,
    )


def example_batch(
    student: LoadedModel,
    natoms: Sequence[int],
    periodic: bool,
    dtype: torch.dtype = torch.float32,
) -> Data:
    """Make a batch of artificial structures with elements of the student.

    ``natoms`` (B,) are the numbers of atoms; real numbers have ``dtype``.
    """
    known = sorted(
        trained_elements(student.normalizer, student.provenance) or {1, 6, 8}
    )
    rng = np.random.default_rng(sum(natoms))
    structures = [_structure(rng, known, count, periodic) for count in natoms]
    rule = student.model.graph_rule
    edges = [sample_edges("made up", s, rule) for s in structures]
    device = next(student.model.parameters()).device
    return collate(structures, edges, dtype).to(device)


def _structure(
    rng: np.random.Generator, known: Sequence[int], count: int, periodic: bool
) -> Structure:
    """Place atoms on a cubic grid, 1.5 Å apart, each with a small displacement."""
    side = int(np.ceil(count ** (1 / 3)))
    grid = np.stack(np.unravel_index(np.arange(count), (side,) * 3), axis=1)
    return Structure(
        rng.choice(known, count).astype(np.uint8),
        1.5 * grid + rng.uniform(-0.2, 0.2, (count, 3)),
        1.5 * (side + 0.5) * np.eye(3),
        np.full(3, periodic),
        np.full(count, 2, np.int8),
        np.zeros(count, bool),
    )
