"""The contract: our models keep it, and every way of breaking it is noticed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import ContractError
from pipeline.models.checkpoint import save_model
from pipeline.models.zoo import build_model
from pipeline.spec.sections import TeacherSpec
from pipeline.structure import Sample
from pipeline.teachers.checks import CHECKS, Subject, check_potential
from pipeline.teachers.potential import FieldInfo, Guarantees, Potential, SampleGraph
from pipeline.teachers.registry import load_potential
from tests.stores import STUDENTS, save_gemnet, save_teacher, teacher_normalizer
from tests.teachers.shared_data import made_samples

Values = dict[str, Tensor]


def _model_file(folder: Path, name: str) -> Path:
    path = folder / f"{name}.safetensors"
    if name == "painn":
        save_teacher(path)
    elif name == "gemnet_oc":
        save_gemnet(path)
    else:
        torch.manual_seed(1)
        model = build_model("schnet", STUDENTS["schnet-demo"])
        save_model(path, "schnet", model, teacher_normalizer(), {})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def _load(folder: Path, name: str) -> Potential:
    path = _model_file(folder, name)
    return load_potential(TeacherSpec(model=name, checkpoint=str(path)))


@pytest.mark.parametrize("name", ["painn", "schnet", "gemnet_oc"])
def test_our_models_keep_the_contract(name: str, folder: Path) -> None:
    kept = dict(check_potential(Subject(_load(folder, name), made_samples())))
    # The made normaliser has two scales, with which forces are no gradient in eV, and
    # at their limits of neighbours PaiNN and GemNet-OC see the order of atoms.
    # Only SchNet's forces are a gradient here, so only it has virials.
    expected = set(CHECKS) - {"gradient_forces"}
    expected -= set() if name == "schnet" else {"virial"}
    assert kept.keys() == expected - (set() if name == "schnet" else {"permutation"})
    assert max(kept.values()) < 1e-3


class Altered(Potential):
    """A SchNet in one scale whose answers ``change`` alters."""

    def __init__(self, inner: Potential, change: Callable[..., Any] | None) -> None:
        self.inner = inner
        self.change = change
        self.available_fields = {
            **inner.available_fields,
            "vector_features": FieldInfo("vector_features", 1),
            "edge_features": FieldInfo("edge_features", 1),
        }
        self.graph_rule = inner.graph_rule
        self.elements = inner.elements
        # Written over: tests that alter it do so on the instance.
        self.normalizer = replace(inner.normalizer, force_std=3.0)
        self.guarantees = Guarantees()
        self.has_virial = True
        self.provenance = {}
        self.calls = 0

    @property
    def identity(self) -> dict[str, Any]:
        return self.inner.identity

    def to(self, device: torch.device) -> None:
        self.inner.to(device)

    def forward(
        self,
        graphs: Sequence[SampleGraph],
        fields: Sequence[str],
        layers: Mapping[str, str],
    ) -> Values:
        known = [name for name in fields if name in self.inner.available_fields]
        values = dict(self.inner.forward(graphs, known, layers))
        scale = self.inner.normalizer.energy_std / self.inner.normalizer.force_std
        values["teacher_forces"] = values["teacher_forces"] * scale
        vectors, lengths = [], []
        for graph in graphs:
            vector, length = _geometry(graph)
            vectors.append(vector)
            lengths.append(length)
        values["vector_features"] = torch.cat(vectors)
        values["edge_features"] = torch.cat(lengths)
        self.calls += 1
        if self.change is not None:
            self.change(values, graphs, self.calls)
        return values


def _geometry(graph: SampleGraph) -> tuple[Tensor, Tensor]:
    """Sum of decaying vectors to the neighbours, (N, 3, 1), and lengths, (E, 1)."""
    structure, edges = graph.structure, graph.edges
    source, target = edges.edge_index
    vector = (
        structure.positions[source]
        + edges.cell_offsets @ structure.cell
        - structure.positions[target]
    )
    length = np.linalg.norm(vector, axis=1)
    sums = np.zeros((len(structure), 3))
    np.add.at(sums, target, vector * np.exp(-length)[:, None])
    return torch.from_numpy(sums[:, :, None]), torch.from_numpy(length[:, None])


def _subject(folder: Path, change: Callable[..., Any] | None = None) -> Subject:
    return Subject(Altered(_load(folder, "schnet"), change), made_samples())


def _kept(subject: Subject) -> dict[str, float]:
    return dict(check_potential(subject))


def test_the_unaltered_potential_keeps_every_check(folder: Path) -> None:
    assert _kept(_subject(folder)).keys() == set(CHECKS)


def _scramble_xyz(values: Values, graphs: Sequence[SampleGraph], calls: int) -> None:
    values["vector_features"] = values["vector_features"][:, [1, 2, 0]]


def _leak_between_samples(
    values: Values, graphs: Sequence[SampleGraph], calls: int
) -> None:
    values["node_features"] = values["node_features"] + 0.1 * len(graphs)


def _count_calls(values: Values, graphs: Sequence[SampleGraph], calls: int) -> None:
    values["per_atom_energy"] = values["per_atom_energy"] + 0.01 * calls


def _number_atoms(values: Values, graphs: Sequence[SampleGraph], calls: int) -> None:
    rows = torch.cat([torch.arange(len(graph.structure)) for graph in graphs])
    values["node_features"] = values["node_features"] + rows[:, None]


def _number_edges(values: Values, graphs: Sequence[SampleGraph], calls: int) -> None:
    rows = torch.cat([torch.arange(len(graph.edges)) for graph in graphs])
    values["edge_features"] = values["edge_features"] + rows[:, None]


def _see_places(values: Values, graphs: Sequence[SampleGraph], calls: int) -> None:
    x = torch.cat(
        [torch.from_numpy(graph.structure.positions[:, :1]) for graph in graphs]
    )
    values["node_features"] = values["node_features"] + x


def _see_directions(values: Values, graphs: Sequence[SampleGraph], calls: int) -> None:
    values["node_features"] = values["node_features"] + values["vector_features"][:, 0]


def _see_handedness(values: Values, graphs: Sequence[SampleGraph], calls: int) -> None:
    """A triple product of the first atom's vectors: turns with, mirrors against."""
    vectors = values["vector_features"][:, :, 0]
    hand = torch.linalg.det(vectors[1:4])
    values["node_features"] = values["node_features"] + hand


def _forget_atoms(values: Values, graphs: Sequence[SampleGraph], calls: int) -> None:
    values["teacher_energy"] = values["teacher_energy"] + 1.0


def _double_forces(values: Values, graphs: Sequence[SampleGraph], calls: int) -> None:
    values["teacher_forces"] = 2 * values["teacher_forces"]


def _turn_virial_round(
    values: Values, graphs: Sequence[SampleGraph], calls: int
) -> None:
    values["teacher_virial"] = -values["teacher_virial"]


def _swap_shears(values: Values, graphs: Sequence[SampleGraph], calls: int) -> None:
    """The six components of VASP in the order of ASE."""
    order = torch.tensor([[0, 4, 8, 1, 5, 2][k] for k in (0, 5, 4, 5, 1, 3, 4, 3, 2)])
    flat = values["teacher_virial"].reshape(-1, 9)
    values["teacher_virial"] = flat[:, order].reshape(-1, 3, 3)


def _skew_virial(values: Values, graphs: Sequence[SampleGraph], calls: int) -> None:
    values["teacher_virial"] = values["teacher_virial"] + torch.eye(3).roll(1, 0)


def _divide_by_volume(
    values: Values, graphs: Sequence[SampleGraph], calls: int
) -> None:
    values["teacher_virial"] = values["teacher_virial"] / 30.0


def _widen(values: Values, graphs: Sequence[SampleGraph], calls: int) -> None:
    values["node_features"] = torch.cat([values["node_features"]] * 2, dim=1)


def _divide_by_zero(values: Values, graphs: Sequence[SampleGraph], calls: int) -> None:
    values["vector_features"] = values["vector_features"] / 0.0


def _drop_edges(values: Values, graphs: Sequence[SampleGraph], calls: int) -> None:
    values["edge_features"] = values["edge_features"][1:]


def _keep_silent(values: Values, graphs: Sequence[SampleGraph], calls: int) -> None:
    del values["edge_features"]


@pytest.mark.parametrize(
    ("change", "check", "said"),
    [
        (_scramble_xyz, "rotation", "Rotating changes vector_features"),
        (_leak_between_samples, "batching", "Batching changes node_features"),
        (_count_calls, "determinism", "Asking twice changes per_atom_energy"),
        (_number_atoms, "permutation", "Renumbering atoms changes node_features"),
        (_number_edges, "permutation", "Renumbering atoms changes edge_features"),
        (_see_places, "translation", "Moving changes node_features"),
        (_see_directions, "rotation", "Rotating changes node_features"),
        (_see_handedness, "reflections", "Mirroring changes node_features"),
        (_forget_atoms, "sum_of_atoms", "Summing over atoms changes teacher_energy"),
        (_double_forces, "gradient_forces", "sample 'water' changes"),
        (_turn_virial_round, "virial", "Along a strain the energy of sample"),
        (_swap_shears, "virial", "Along a strain the energy of sample"),
        (_divide_by_volume, "virial", "Along a strain the energy of sample"),
        (_skew_virial, "virial", "is not symmetric"),
        (_skew_virial, "rotation", "Rotating changes teacher_virial"),
        (_widen, "shapes", "node_features has shape"),
        (_divide_by_zero, "shapes", "vector_features holds numbers that are not"),
        (_drop_edges, "shapes", "edge_features has shape"),
        (_keep_silent, "shapes", "returned no edge_features"),
    ],
)
def test_a_broken_promise_is_noticed(
    change: Callable[..., Any], check: str, said: str, folder: Path
) -> None:
    with pytest.raises(ContractError, match=said):
        CHECKS[check](_subject(folder, change))


@pytest.mark.parametrize(
    ("claim", "change"),
    [
        ("permutation", _number_atoms),
        ("sum_of_atoms", _forget_atoms),
        ("gradient_forces", _double_forces),
    ],
)
def test_what_is_not_claimed_is_not_checked(
    claim: str, change: Callable[..., Any], folder: Path
) -> None:
    subject = _subject(folder, change)
    subject.potential.guarantees = replace(Guarantees(), **{claim: False})
    assert _kept(subject).keys() == set(CHECKS) - {claim}


class Unsorted(Altered):
    """Gives its edges from the last to the first."""

    def graph(self, sample: Sample) -> SampleGraph:
        graph = super().graph(sample)
        edges = replace(
            graph.edges,
            edge_index=graph.edges.edge_index[:, ::-1].copy(),
            cell_offsets=graph.edges.cell_offsets[::-1].copy(),
        )
        return replace(graph, edges=edges)


class Doubled(Altered):
    """Has every edge twice."""

    def graph(self, sample: Sample) -> SampleGraph:
        graph = super().graph(sample)
        edges = replace(
            graph.edges,
            edge_index=np.repeat(graph.edges.edge_index, 2, axis=1),
            cell_offsets=np.repeat(graph.edges.cell_offsets, 2, axis=0),
        )
        return replace(graph, edges=edges)


@pytest.mark.parametrize(
    ("kind", "said"), [(Unsorted, "not sorted by target"), (Doubled, "an edge twice")]
)
def test_edges_out_of_order_are_noticed(
    kind: type[Altered], said: str, folder: Path
) -> None:
    potential = kind(_load(folder, "schnet"), None)
    with pytest.raises(ContractError, match=said):
        CHECKS["edges"](Subject(potential, made_samples()))


def _unknown_field(potential: Altered) -> None:
    potential.available_fields = {"charges": FieldInfo("charges", 1)}


def _no_cutoff(potential: Altered) -> None:
    potential.graph_rule = replace(potential.graph_rule, cutoff=0.0)


def _array_in_provenance(potential: Altered) -> None:
    potential.provenance = {"scale": np.ones(2)}


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (_unknown_field, "'charges'"),
        (_no_cutoff, "cutoff must be positive"),
        (_array_in_provenance, "provenance is not JSON-able"),
    ],
)
def test_incomplete_declarations_are_noticed(
    alter: Callable[[Altered], None], said: str, folder: Path
) -> None:
    subject = _subject(folder)
    assert isinstance(subject.potential, Altered)
    alter(subject.potential)
    with pytest.raises(ContractError, match=said):
        CHECKS["declaration"](subject)
