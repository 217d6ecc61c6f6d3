"""A teacher with a Hessian that is known: harmonic springs between all atoms."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.graphs.neighbors import NeighborSpec
from pipeline.spec.sections import TeacherSpec
from pipeline.structure import Sample, Structure
from pipeline.teachers.potential import FieldInfo, Potential, SampleGraph
from pipeline.teachers.runner import TeacherRunner

STIFFNESS = 20.0


class Springs(Potential):
    """E = Σ k/2 (r - r₀)² over the pairs of a structure, r₀ those of ``rest``."""

    available_fields: Mapping[str, FieldInfo] = {}
    graph_rule = NeighborSpec(6.0, 100, symmetric=False)
    elements = range(1, 100)

    def __init__(self, rest: np.ndarray) -> None:
        self.rest = torch.from_numpy(rest)

    @property
    def identity(self) -> dict[str, Any]:
        return {"checkpoint_sha256": "springs"}

    def to(self, device: torch.device) -> None:
        pass

    def energy(self, positions: torch.Tensor) -> torch.Tensor:
        """Energy in eV of ``positions`` (N, 3) in Å."""
        one, other = torch.triu_indices(len(positions), len(positions), 1)
        lengths = (positions[one] - positions[other]).norm(dim=1)
        wanted = (self.rest[one] - self.rest[other]).norm(dim=1)
        return STIFFNESS / 2 * (lengths - wanted).square().sum()

    def forward(
        self,
        graphs: Sequence[SampleGraph],
        fields: Sequence[str],
        layers: Mapping[str, str],
    ) -> Mapping[str, torch.Tensor]:
        energies, forces = [], []
        with torch.enable_grad():
            for graph in graphs:
                places = torch.from_numpy(graph.structure.positions).requires_grad_()
                energy = self.energy(places)
                (slope,) = torch.autograd.grad(energy, places)
                energies.append(energy.detach())
                forces.append(-slope)
        return {
            "teacher_energy": torch.stack(energies),
            "teacher_forces": torch.cat(forces),
        }


def springs(sample: Sample) -> TeacherRunner:
    """Springs that are at rest in ``sample``."""
    spec = TeacherSpec(model="springs", batch_atoms=4096)
    potential = Springs(sample.structure.positions)
    return TeacherRunner(potential, spec, torch.device("cpu"))


def molecule(
    name: str = "a", n: int = 4, fixed: Sequence[int] = (), seed: int = 0
) -> Sample:
    """``n`` carbon atoms at least 1.2 Å apart."""
    random = np.random.default_rng(seed)
    places = [np.zeros(3)]
    while len(places) < n:
        place = random.uniform(-1.8, 1.8, 3)
        if min(np.linalg.norm(place - other) for other in places) > 1.2:
            places.append(place)
    held = np.zeros(n, np.bool_)
    held[list(fixed)] = True
    structure = Structure(
        np.full(n, 6, np.uint8),
        np.array(places),
        np.zeros((3, 3)),
        np.zeros(3, np.bool_),
        np.full(n, 2, np.int8),
        held,
    )
    return Sample.without_labels(name, structure)
