"""What every teacher must keep: plain checks that anyone can run on their plug-in.

Each check returns the largest deviation it saw, in units of its tolerance's scale, and
raises :class:`~pipeline.errors.ContractError` with one sentence when it is too large.
Fields are compared at their default layer and at every other one they offer.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ContractError
from pipeline.fields import (
    CACHEABLE_FIELDS,
    FIELDS,
    TEACHER_VIRIAL,
)
from pipeline.structure import Sample
from pipeline.teachers.potential import Potential, SampleGraph
from pipeline.teachers.slopes import check_gradient_forces, check_virial
from pipeline.teachers.subject import Floats, Subject, turn_and_move

# An atom moves by this along each axis (Å), in so many tries to keep all edges.
_DISPLACEMENT = 0.05
_DISPLACEMENTS = 20


def check_potential(subject: Subject) -> Iterator[tuple[str, float]]:
    """Names of the checks that apply with the largest deviation each has seen.

    Raises
    ------
    ContractError
        The first check that fails.
    """
    guarantees = asdict(subject.potential.guarantees)
    for name, check in CHECKS.items():
        if name == "virial" and not subject.potential.has_virial:
            continue
        if guarantees.get(name, True):
            yield name, check(subject)


def check_declaration(subject: Subject) -> float:
    """What the potential says of itself is complete, known and JSON-able."""
    potential = subject.potential
    for name, offer in potential.available_fields.items():
        if name not in CACHEABLE_FIELDS or offer.name != name:
            raise ContractError(f"offers[{name!r}] is not a field of a store.")
    if not potential.graph_rule.cutoff > 0:
        raise ContractError("graph_rule.cutoff must be positive.")
    for title, part in (
        ("identity", potential.identity),
        ("provenance", dict(potential.provenance)),
    ):
        try:
            json.dumps(part, sort_keys=True)
        except TypeError as error:
            raise ContractError(f"{title} is not JSON-able ({error}).") from None
    if not potential.identity.get("checkpoint_sha256"):
        raise ContractError("identity lacks checkpoint_sha256, a hash of the weights.")
    if potential.identity != potential.identity:
        raise ContractError("identity differs from one call to the next.")
    return 0.0


def check_shapes(subject: Subject) -> float:
    """Every output has the rows of its level, the declared width and finite values."""
    atoms = int(subject.n_atoms.sum())
    graphs = [subject.potential.graph(sample) for sample in subject.samples]
    edges = sum(len(graph.edges) for graph in graphs)
    rows = {"node": atoms, "edge": edges, "sample": len(graphs)}
    for key, values in subject.outputs().items():
        name, _, layer = key.partition("@")
        field = FIELDS[name]
        offer = subject.potential.available_fields.get(name)
        width = 0 if offer is None else offer.layers[layer] if layer else offer.width
        shape = (rows[field.level], *(width if n is None else n for n in field.shape))
        if values.shape != shape:
            raise ContractError(f"{key} has shape {values.shape}, not {shape}.")
        if not np.isfinite(values).all():
            raise ContractError(f"{key} holds numbers that are not finite.")
    return 0.0


def check_edges(subject: Subject) -> float:
    """Edges of every sample are unique and sorted by target, source and shift."""
    for sample in subject.samples:
        edges = subject.potential.graph(sample).edges
        source, target = edges.edge_index
        rows = np.column_stack((target, source, edges.cell_offsets))
        order = np.lexsort(rows.T[::-1])
        if (order != np.arange(len(rows))).any():
            raise ContractError(
                f"Edges of sample {sample.sample_id!r} are not sorted by target, "
                "source and shift."
            )
        if len(np.unique(rows, axis=0)) != len(rows):
            raise ContractError(f"Sample {sample.sample_id!r} has an edge twice.")
    return 0.0


def check_determinism(subject: Subject) -> float:
    """The same batch twice gives the same numbers."""
    first = subject.outputs()
    return subject.worst("Asking twice", subject.outputs(), first)


def check_batching(subject: Subject) -> float:
    """A batch gives what its samples give one by one."""
    singles = [subject.outputs([sample]) for sample in subject.samples]
    wanted = {key: np.concatenate([one[key] for one in singles]) for key in singles[0]}
    return subject.worst("Batching", subject.outputs(), wanted)


def check_permutation(subject: Subject) -> float:
    """Renumbering the atoms renumbers the output."""
    worst = 0.0
    for number, sample in enumerate(subject.samples):
        order = np.random.default_rng(number).permutation(len(sample.structure))
        renumbered = _renumber_atoms(sample, order)
        rows = {
            "node": order,
            "edge": _edge_rows(subject.potential, sample, renumbered, order),
            "sample": np.arange(1),
        }
        wanted = {
            key: values[rows[FIELDS[key.partition("@")[0]].level]]
            for key, values in subject.outputs([sample]).items()
        }
        found = subject.outputs([renumbered])
        worst = max(worst, subject.worst("Renumbering atoms", found, wanted))
    return worst


def check_translation(subject: Subject) -> float:
    """Moving a structure changes nothing."""
    moved = [
        turn_and_move(sample, np.eye(3), np.array([3.1, -2.3, 1.7]))
        for sample in subject.samples
    ]
    return subject.worst("Moving", subject.outputs(moved), subject.outputs())


def check_rotation(subject: Subject) -> float:
    """Rotating a structure turns vectors and forces and changes nothing else."""
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    return _check_turn(subject, "Rotating", turn * np.sign(np.linalg.det(turn)))


def check_reflections(subject: Subject) -> float:
    """Mirroring a structure mirrors vectors and forces and changes nothing else."""
    return _check_turn(subject, "Mirroring", np.diag([1.0, -1.0, 1.0]))


def check_sum_of_atoms(subject: Subject) -> float:
    """Energies are the sum of ``per_atom_energy``, mean and references."""
    outputs = subject.outputs()
    normalizer = subject.potential.normalizer
    references = np.array(normalizer.element_references)
    ends = np.cumsum(subject.n_atoms)[:-1]
    parts = np.split(outputs["per_atom_energy"], ends)
    totals = [
        part.sum()
        + normalizer.energy_mean
        + references[s.structure.atomic_numbers].sum()
        for part, s in zip(parts, subject.samples, strict=True)
    ]
    wanted = {"teacher_energy": np.array(totals)}
    return subject.worst("Summing over atoms", outputs, wanted)


def check_displacement(subject: Subject) -> float:
    """Compare graphs with displaced atoms with graphs made for those atoms.

    One atom moves at a time, so far that forces change by more than the tolerance, and
    only where the move does not change the edges.
    """
    worst = 0.0
    for number, sample in enumerate(subject.samples):
        random = np.random.default_rng(number)
        graph = subject.potential.graph(sample)
        for _ in range(_DISPLACEMENTS):
            positions = sample.structure.positions.copy()
            atom = int(random.integers(len(positions)))
            positions[atom] += _DISPLACEMENT * random.choice([-1.0, 1.0], 3)
            structure = replace(sample.structure, positions=positions)
            moved = replace(sample, structure=structure)
            if _has_edges_of(subject.potential, moved, graph):
                displaced = subject.potential.with_positions(graph, positions)
                found = subject.outputs(graphs=[displaced])
                words = "Using with_positions instead of a new graph"
                wanted = subject.outputs([moved])
                worst = max(worst, subject.worst(words, found, wanted))
                break
    return worst


# Names of claims are those of the checks that belong to them.
CHECKS: Mapping[str, Callable[[Subject], float]] = {
    "declaration": check_declaration,
    "shapes": check_shapes,
    "edges": check_edges,
    "displacement": check_displacement,
    "determinism": check_determinism,
    "batching": check_batching,
    "permutation": check_permutation,
    "translation": check_translation,
    "rotation": check_rotation,
    "reflections": check_reflections,
    "sum_of_atoms": check_sum_of_atoms,
    "gradient_forces": check_gradient_forces,
    "virial": check_virial,
}


def _check_turn(subject: Subject, what: str, turn: Floats) -> float:
    turned = [turn_and_move(sample, turn, np.zeros(3)) for sample in subject.samples]
    wanted = subject.outputs()
    for key, values in wanted.items():
        if key.startswith("vector_features"):
            wanted[key] = np.einsum("nxc,xy->nyc", values, turn)
        elif key == "teacher_forces":
            wanted[key] = values @ turn
        elif key == TEACHER_VIRIAL:
            wanted[key] = turn.T @ values @ turn
    return subject.worst(what, subject.outputs(turned), wanted)


def _has_edges_of(potential: Potential, sample: Sample, graph: SampleGraph) -> bool:
    """Whether the graph of ``sample`` has the same edges as ``graph``."""
    edges = potential.graph(sample).edges
    return np.array_equal(edges.edge_index, graph.edges.edge_index) and np.array_equal(
        edges.cell_offsets, graph.edges.cell_offsets
    )


def _renumber_atoms(sample: Sample, order: npt.NDArray[np.int64]) -> Sample:
    """The sample whose atom i is atom ``order[i]`` of ``sample``."""
    structure = sample.structure
    names = ("atomic_numbers", "positions", "tags", "fixed")
    changes: dict[str, Any] = {n: getattr(structure, n)[order] for n in names}
    return replace(
        sample, structure=replace(structure, **changes), forces=sample.forces[order]
    )


def _edge_rows(
    potential: Potential,
    sample: Sample,
    renumbered: Sample,
    order: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """For every edge of the renumbered sample, the same edge's row in the sample."""
    rows = []
    for one, names in ((sample, np.arange(len(order))), (renumbered, order)):
        edges = potential.graph(one).edges
        ends = names[edges.edge_index].T
        rows.append([tuple(row) for row in np.hstack((ends, edges.cell_offsets))])
    place = {edge: row for row, edge in enumerate(rows[0])}
    if place.keys() != set(rows[1]):
        raise ContractError(
            f"Renumbering the atoms of sample {sample.sample_id!r} changes its edges."
        )
    return np.array([place[edge] for edge in rows[1]], np.int64)
