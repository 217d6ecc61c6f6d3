"""The process that writes a file of metatomic; see `kd_train.evaluation.metatomic`."""

# ruff: noqa: UP006, UP035, UP045 - metatomic compares annotations with these.
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Dict, List, Optional

# Before torch_geometric, which replaces a function of torch.
import metatomic.torch as mta
import torch
from metatensor.torch import Labels, TensorBlock, TensorMap
from torch import Tensor, nn
from torch_geometric.data import Data

from kd_train.evaluation.export import TOLERANCE, example_batch
from kd_train.evaluation.load_student import load_student
from pipeline.files.atomic import write_atomically
from pipeline.models.checkpoint import LoadedModel
from pipeline.models.derivatives import predict_gradients
from pipeline.models.elements import trained_elements, usable_elements
from pipeline.models.layers import edge_vectors
from pipeline.parallel.device_choice import choose_device

# Numbers of atoms in the recorded pass, and of those that it is compared on.
_RECORDED = [7]
_COMPARED = ([9], [2], [3, 12, 5])


class AtomicEnergies(nn.Module):
    """Energies of atoms as a function of the vectors of edges, in eV and Å."""

    cell: Tensor
    references: Tensor

    def __init__(self, student: LoadedModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = student.model
        self.scale = student.normalizer.energy_std
        references = torch.tensor(
            student.normalizer.element_references, dtype=torch.float64
        )
        self.register_buffer("cell", torch.eye(3, dtype=dtype)[None])
        self.register_buffer("references", references)

    def forward(self, numbers: Tensor, edge_index: Tensor, vectors: Tensor) -> Tensor:
        """Return energies (N,) of atoms, without the mean of the normaliser.

        ``numbers`` (N,) int64, ``edge_index`` (2, E) from source to target, and
        ``vectors`` (E, 3) from target to source.
        """
        atoms = numbers.shape[0]
        data = Data(
            atomic_numbers=numbers,
            positions=vectors.new_zeros(atoms, 3),
            edge_index=edge_index,
            # In a cell of unit vectors, vectors in Å are shifts in cells.
            cell_offsets=vectors,
            cell=self.cell,
            batch=torch.zeros_like(numbers),
            num_nodes=atoms,
            num_graphs=1,
            recorded=True,
        )
        per_atom = self.model.predict_energies(data).per_atom_energy
        total = per_atom.double() * self.scale + self.references[numbers]
        return total.to(vectors.dtype)


class MetatomicStudent(nn.Module):
    """Module that metatomic calls; TorchScript compiles its methods."""

    def __init__(self, energies: nn.Module, student: LoadedModel) -> None:
        super().__init__()
        rule = student.model.graph_rule
        self.energies = energies
        self.mean = student.normalizer.energy_mean
        self.periodic = rule.periodic
        self.options = mta.NeighborListOptions(
            cutoff=rule.cutoff, full_list=True, strict=True
        )

    def requested_neighbor_lists(self) -> List[mta.NeighborListOptions]:
        """Return the neighbour list that programs are to make."""
        return [self.options]

    def forward(
        self,
        systems: List[mta.System],
        outputs: Dict[str, mta.ModelOutput],
        selected_atoms: Optional[Labels],
    ) -> Dict[str, TensorMap]:
        """Return energies of systems or of atoms, in eV."""
        results = torch.jit.annotate(Dict[str, TensorMap], {})
        if "energy" not in outputs:
            return results
        numbers, edges, vectors, samples = self.graph(systems)
        energy = self.energies(numbers, edges, vectors)
        if selected_atoms is not None:
            chosen = Labels(["system", "atom"], samples).select(selected_atoms)
            energy, samples = energy[chosen], samples[chosen]
        of_system = samples[:, 0].to(torch.int64)
        # The mean belongs to a structure: its atoms here share it.
        counts = torch.bincount(of_system, minlength=len(systems))
        energy = energy + self.mean / counts[of_system].to(energy.dtype)
        names = ["system", "atom"]
        if outputs["energy"].sample_kind != "atom":
            total = torch.zeros(len(systems), dtype=energy.dtype, device=energy.device)
            energy = total.index_add(0, of_system, energy)
            names = ["system"]
            rows = torch.arange(len(systems), device=energy.device)
            samples = rows.to(torch.int32).unsqueeze(1)
        zero = torch.zeros((1, 1), dtype=torch.int32, device=energy.device)
        block = TensorBlock(
            values=energy.unsqueeze(1),
            samples=Labels(names, samples),
            components=torch.jit.annotate(List[Labels], []),
            properties=Labels(["energy"], zero),
        )
        results["energy"] = TensorMap(Labels(["_"], zero), [block])
        return results

    def graph(self, systems: List[mta.System]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return numbers (N,), edges (2, E), vectors (E, 3), systems and atoms (N, 2).

        Edges go from source to target, vectors from target to source.
        """
        numbers = torch.jit.annotate(List[Tensor], [])
        edges = torch.jit.annotate(List[Tensor], [])
        vectors = torch.jit.annotate(List[Tensor], [])
        samples = torch.jit.annotate(List[Tensor], [])
        first = 0
        for index, system in enumerate(systems):
            if not self.periodic and bool(torch.any(system.pbc)):
                raise ValueError(
                    "The structure is periodic, but the student's graphs ignore "
                    "periodic images (use_pbc: false); use a student with use_pbc: true"
                )
            found = system.get_neighbor_list(self.options)
            pairs = found.samples
            ends = (pairs.column("second_atom"), pairs.column("first_atom"))
            edges.append(torch.stack(ends).to(torch.int64) + first)
            vectors.append(found.values.squeeze(2))
            numbers.append(system.types.to(torch.int64))
            atoms = torch.arange(len(system), device=system.types.device)
            atoms = atoms.to(torch.int32)
            samples.append(torch.stack((torch.full_like(atoms, index), atoms), 1))
            first += len(system)
        return (
            torch.cat(numbers),
            torch.cat(edges, 1),
            torch.cat(vectors),
            torch.cat(samples),
        )


def write(
    place: Path, path: Path, device: torch.device, dtype: str
) -> dict[str, float]:
    """Write the file and return its largest deviations, as `export_metatomic` does."""
    student = load_student(place, device)
    precision = {"float32": torch.float32, "float64": torch.float64}[dtype]
    student.model.to(precision)
    energies = AtomicEnergies(student, precision).eval().to(device)
    inputs = _inputs(example_batch(student, _RECORDED, False, precision))
    traced = torch.jit.trace(energies, inputs, check_trace=False)
    worst = _compare(student, traced, precision)
    program = mta.AtomisticModel(
        MetatomicStudent(traced, student).eval(),
        _metadata(student),
        _capabilities(student, device.type, dtype),
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "student.pt")
        program.save(str(file))
        write_atomically(path, file.read_bytes())
    return worst


def _inputs(batch: Data) -> tuple[Tensor, Tensor, Tensor]:
    """Return the arguments of `AtomicEnergies` for a collated batch."""
    vectors = edge_vectors(batch, batch.positions)
    return batch.atomic_numbers, batch.edge_index, vectors


def _compare(
    student: LoadedModel, traced: nn.Module, dtype: torch.dtype
) -> dict[str, float]:
    """Return the largest deviations of the recorded pass from the student."""
    worst = {"energy": 0.0, "forces": 0.0}
    for natoms in _COMPARED:
        periodic = student.model.graph_rule.periodic and len(natoms) == 1
        batch = example_batch(student, natoms, periodic, dtype)
        expected = predict_gradients(student.model, batch)
        scale, mean = student.normalizer.energy_std, student.normalizer.energy_mean
        assert expected.forces is not None
        wanted = student.normalizer.denormalize_energy(
            expected.energy, batch.atomic_numbers, batch.batch
        )
        batch.positions.requires_grad_()
        found = traced(*_inputs(batch))
        (slope,) = torch.autograd.grad(found.sum(), batch.positions)
        energy = wanted.new_zeros(len(natoms)).index_add(0, batch.batch, found.double())
        pairs = {
            "energy": (energy + mean, wanted),
            "forces": (-slope, expected.forces * scale),
        }
        for name, (one, other) in pairs.items():
            deviation = float((one - other).detach().abs().max())
            if not deviation <= TOLERANCE * max(1.0, float(other.detach().abs().max())):
                sys.exit(
                    f"the recorded {name} deviate from the model by {deviation:.2g} "
                    f"for {sum(natoms)} atoms."
                )
            worst[name] = max(worst[name], deviation)
    return worst


def _metadata(student: LoadedModel) -> mta.ModelMetadata:
    return mta.ModelMetadata(
        name=f"kd-train {student.name}",
        description=f"Distilled student; SHA-256 of its model file: {student.sha256}",
    )


def _capabilities(
    student: LoadedModel, device: str, dtype: str
) -> mta.ModelCapabilities:
    rule, settings = student.model.graph_rule, student.model.hyperparameters
    layers = settings.get("num_layers") or settings["num_interactions"]
    trained = trained_elements(student.normalizer, student.provenance)
    known = usable_elements(student.model.elements, trained, "any_element")
    return mta.ModelCapabilities(
        # Of atoms, and so of systems too.
        outputs={"energy": mta.ModelOutput(unit="eV", sample_kind="atom")},
        atomic_types=[z for z in student.model.elements if z in known],
        # What is farther away reaches no atom through all layers.
        interaction_range=rule.cutoff * layers,
        length_unit="angstrom",
        supported_devices=[device],
        dtype=dtype,
    )


def main() -> None:
    """Write a file: arguments are the student, the path, the device and the dtype."""
    place, path, device, dtype = sys.argv[1:]
    # Warnings of torch: TorchScript is deprecated, and recorded passes are fixed.
    warnings.simplefilter("ignore")
    worst = write(Path(place), Path(path), choose_device(device), dtype)
    print(json.dumps(worst))


if __name__ == "__main__":
    main()
