"""What a trained potential offers so that a store can be made of it.

A package adds a teacher by registering ``load(spec: TeacherSpec) -> Potential`` under
the entry-point group ``pipeline.teachers``; ``docs/teachers.md`` shows one.
"""

from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from pipeline.errors import DataError
from pipeline.fields import FIELDS, Level
from pipeline.graphs.neighbors import (
    Edges,
    NeighborSpec,
    check_periodicity,
    sample_edges,
)
from pipeline.models.elements import check_elements
from pipeline.models.normalizer import Normalizer
from pipeline.structure import Sample, Structure

Symmetry = Literal["invariant", "vector"]
Precision = Literal["float32", "tf32", "bfloat16"]
PLAIN_PRECISIONS: tuple[Precision, ...] = ("float32", "tf32")


@dataclass(frozen=True)
class FieldInfo:
    """A field that a potential can give.

    ``width`` is its number of channels where no layer is named: 0 for fields without
    channels, None where a layer must be named. ``layers`` maps the name of every layer
    that it can also be taken from to its width there.
    """

    name: str
    width: int | None
    layers: Mapping[str, int] = field(default_factory=dict)

    @property
    def level(self) -> Level:
        """What a row of the field belongs to: an atom or an edge."""
        return FIELDS[self.name].level

    @property
    def symmetry(self) -> Symmetry:
        """How the field answers a rotation of the structure."""
        return "vector" if self.name == "vector_features" else "invariant"


@dataclass(frozen=True)
class Guarantees:
    """What a potential promises beyond what all must keep; the contract checks it.

    ``permutation``: renumbered atoms change nothing but the order of rows.
    ``reflections``: mirroring a structure changes no invariant and mirrors vectors.
    ``sum_of_atoms``: energies are the sum of ``per_atom_energy`` and of the
    normaliser's mean and references. ``gradient_forces``: forces are ``-dE/dx``.
    """

    permutation: bool = True
    reflections: bool = True
    sum_of_atoms: bool = True
    gradient_forces: bool = True


@dataclass(frozen=True)
class SampleGraph:
    """One structure, ready to be batched.

    ``edges`` are those that ``edge_features`` have a row for, sorted by (target,
    source, shift); ``extra`` is whatever the potential prepared for its batches.
    """

    structure: Structure
    edges: Edges
    extra: Any = None


def check_sample(sample: Sample, elements: Container[int], rule: NeighborSpec) -> None:
    """Refuse a sample with unknown ``elements``, or periodicity that ``rule`` ignores.

    Neighbours are not looked for.

    Raises
    ------
    DataError
        An element is unknown, or periodicity would be ignored; names the sample.
    """
    numbers = sample.structure.atomic_numbers
    check_elements(numbers, elements, [sample.sample_id] * len(numbers))
    try:
        check_periodicity(sample.structure, rule)
    except DataError as error:
        raise DataError(f"Sample {sample.sample_id!r}: {error}") from None


class Potential(ABC):
    """A frozen network in evaluation mode that names its outputs; eV and Å.

    ``available_fields`` says by field name what it can give beside energies and forces,
    ``graph_rule`` how its edges are found (its ``cutoff`` in Å), ``elements`` the
    atomic numbers it knows, ``normalizer`` the scale of its energies and forces (what
    students work in), ``has_virial`` whether it gives virials, ``precisions`` the
    matrix precisions it can run with and ``provenance`` (JSON-able) where it comes
    from.
    """

    available_fields: Mapping[str, FieldInfo]
    graph_rule: NeighborSpec
    elements: Container[int]
    normalizer: Normalizer = Normalizer()
    guarantees: Guarantees = Guarantees()
    has_virial: bool = False
    precisions: tuple[Precision, ...] = PLAIN_PRECISIONS
    provenance: Mapping[str, Any] = {}

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All of the potential that decides its numbers, weights by hash; JSON-able.

        Must hold ``checkpoint_sha256``, a hash of the weights.
        """

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Move weights to ``device``, where :meth:`forward` then works."""

    @abstractmethod
    def forward(
        self,
        graphs: Sequence[SampleGraph],
        fields: Sequence[str],
        layers: Mapping[str, str],
    ) -> Mapping[str, torch.Tensor]:
        """``teacher_energy``, ``teacher_forces`` and ``fields`` of a batch.

        With ``has_virial`` also ``teacher_virial`` (B, 3, 3) float64 in eV, in each
        pass: minus the derivative of the energy with respect to a symmetric strain,
        -V times the stress. It must be finite for molecules.

        Rows run over the graphs in their order: ``teacher_energy`` (B,) in eV,
        ``teacher_forces`` (N, 3) in eV/Å, ``per_atom_energy`` (N,) in eV without the
        normaliser's mean and references, ``node_features`` (N, C), ``vector_features``
        (N, 3, C) with Cartesian components x, y, z, ``edge_features`` (E, C) on
        ``graph.edges``, ``edge_to_node_features`` (N, C). ``layers`` names the layer of
        some fields. Called without gradients; what needs them switches them on.
        """

    def graph(self, sample: Sample) -> SampleGraph:
        """The sample with its edges under ``graph_rule``; called from another thread.

        Raises
        ------
        DataError
            An element is unknown, there are no neighbours, the cell cannot be, or the
            structure is periodic and ``graph_rule`` is not.
        """
        structure = sample.structure
        check_sample(sample, self.elements, self.graph_rule)
        edges = sample_edges(sample.sample_id, structure, self.graph_rule)
        return SampleGraph(structure, edges)

    def with_positions(
        self, graph: SampleGraph, positions: npt.NDArray[np.float64]
    ) -> SampleGraph:
        """Return ``graph`` with other ``positions`` (N, 3) in Å and the same edges.

        Potentials whose ``extra`` depends on positions must compute it again, without
        a change of edges or angles.
        """
        return replace(graph, structure=replace(graph.structure, positions=positions))

    def estimate_memory(self, graph: SampleGraph) -> int:
        """Bytes that one graph adds to the peak of a pass; 0 where atoms limit it."""
        return 0
