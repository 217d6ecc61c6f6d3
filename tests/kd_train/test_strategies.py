"""Every strategy: its loss, its zero, its gradient, its adapter, its refusals."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from kd_train.config.sections import DistillConfig, LossConfig
from kd_train.config.strategy_names import BUILT_IN, STRATEGIES
from kd_train.strategies import Strategy, load_strategy
from kd_train.strategies.base import Setting
from kd_train.trainer.setup import make_learner
from pipeline.errors import DataError, SpecError
from pipeline.models.normalizer import Normalizer
from pipeline.models.output import ModelOutput
from pipeline.store.reader import FeatureStore
from tests.stores import teacher_normalizer, train_config

ATOMS = (4, 3, 5)
N = sum(ATOMS)
S, T = 5, 7
FIXED = [1, 6, 7]
NUMBERS = [6, 1, 1, 8, 1, 1, 6, 8, 1, 6, 6, 1]
NAMES = tuple(BUILT_IN)
# The tests of jacobian, which needs displaced copies, are in test_jacobian.py.
OF_ONE_PASS = tuple(name for name in NAMES if name != "jacobian")


def _setting(
    student: int = S, teacher: int = T, normalizer: Normalizer | None = None
) -> Setting:
    return Setting(
        student_name="a student",
        student_widths={"node_features": student, "vector_features": student},
        teacher_widths={
            "node_features": teacher,
            "edge_to_node_features": teacher,
            "vector_features": teacher,
            "edge_features": teacher,
            "teacher_energy": 0,
            "teacher_forces": 0,
            "per_atom_energy": 0,
        },
        normalizer=normalizer or teacher_normalizer(),
        loss=LossConfig(energy_weight=2.0, force_weight=30.0),
        seed=4,
    )


@dataclass
class Case:
    """What a student says and what the store holds, as float64 arrays."""

    output: ModelOutput
    batch: Data


def _random(generator: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(generator.normal(size=shape)).float()


@pytest.fixture
def case() -> Case:
    return _case()


def _case(student: int = S, teacher: int = T) -> Case:
    generator = np.random.default_rng(11)
    output = ModelOutput(
        energy=_random(generator, len(ATOMS)),
        forces=_random(generator, N, 3),
        per_atom_energy=_random(generator, N),
        node_features=_random(generator, N, student),
        vector_features=_random(generator, N, 3, student),
    )
    fixed = torch.zeros(N, dtype=torch.bool)
    fixed[FIXED] = True
    edges = torch.tensor([[0, 1, 2, 4, 5, 9], [1, 0, 3, 5, 4, 11]])
    batch = Data(
        atomic_numbers=torch.tensor(NUMBERS),
        batch=torch.repeat_interleave(torch.arange(len(ATOMS)), torch.tensor(ATOMS)),
        fixed=fixed,
        num_nodes=N,
        teacher_energy=_random(generator, len(ATOMS)).double() * 50 - 200,
        teacher_forces=_random(generator, N, 3),
        per_atom_energy=_random(generator, N),
        node_features=_random(generator, N, teacher),
        edge_to_node_features=_random(generator, N, teacher),
        vector_features=_random(generator, N, 3, teacher),
        teacher_edge_index=edges,
        edge_features=_random(generator, edges.shape[1], teacher),
    )
    return Case(output, batch)


def _weights(strategy: Strategy) -> tuple[np.ndarray, np.ndarray]:
    """Matrix (T, S) and offset (T,) of a strategy's linear adapter."""
    assert isinstance(strategy.adapter, torch.nn.Linear)
    matrix = strategy.adapter.weight.detach().double().numpy()
    bias = strategy.adapter.bias
    offset = np.zeros(len(matrix)) if bias is None else bias.detach().double().numpy()
    return matrix, offset


def _brute_nodes(strategy: Strategy, case: Case) -> float:
    matrix, offset = _weights(strategy)
    total = 0.0
    for atom in range(N):
        mapped = matrix @ case.output.node_features[atom].double().numpy() + offset
        target = case.batch[strategy.fields[0]][atom].double().numpy()
        total += sum((a - b) ** 2 for a, b in zip(mapped, target, strict=True))
    return total / (N * T)


def _brute_vectors(strategy: Strategy, case: Case) -> float:
    matrix, offset = _weights(strategy)
    assert not offset.any()
    assert case.output.vector_features is not None
    total = 0.0
    for atom in range(N):
        for axis in range(3):
            own = case.output.vector_features[atom, axis].double().numpy()
            target = case.batch.vector_features[atom, axis].double().numpy()
            total += float(((matrix @ own - target) ** 2).sum())
    return total / (N * 3 * T)


def _brute_edges(strategy: Strategy, case: Case) -> float:
    matrix, offset = _weights(strategy)
    assert case.output.vector_features is not None
    vectors = case.output.vector_features.double().numpy()
    pairs = case.batch.teacher_edge_index.T.tolist()
    total = 0.0
    for number, (source, target) in enumerate(pairs):
        invariants = np.array(
            [vectors[source, :, c] @ vectors[target, :, c] for c in range(S)]
        )
        wanted = case.batch.edge_features[number].double().numpy()
        total += float(((matrix @ invariants + offset - wanted) ** 2).sum())
    return total / (len(pairs) * T)


def _brute_outputs(strategy: Strategy, case: Case) -> float:
    units = teacher_normalizer()
    energies, first = [], 0
    for sample, size in enumerate(ATOMS):
        numbers = NUMBERS[first : first + size]
        first += size
        offset = units.energy_mean + sum(units.element_references[z] for z in numbers)
        target = (float(case.batch.teacher_energy[sample]) - offset) / units.energy_std
        energies.append(abs(float(case.output.energy[sample]) - target))
    assert case.output.forces is not None
    lengths = []
    for atom in range(N):
        if atom in FIXED:
            continue
        target = case.batch.teacher_forces[atom].double().numpy() / units.force_std
        lengths.append(
            np.linalg.norm(case.output.forces[atom].double().numpy() - target)
        )
    return 2.0 * float(np.mean(energies)) + 30.0 * float(np.mean(lengths))


def _brute_atom_energies(strategy: Strategy, case: Case) -> float:
    scale = teacher_normalizer().energy_std
    own = case.output.per_atom_energy.tolist()
    stored = case.batch.per_atom_energy.tolist()
    return sum(abs(s - t / scale) for s, t in zip(own, stored, strict=True)) / N


BRUTE_FORCE: dict[str, Callable[[Strategy, Case], float]] = {
    "n2n": _brute_nodes,
    "e2n": _brute_nodes,
    "v2v": _brute_vectors,
    "e2e": _brute_edges,
    "vanilla1": _brute_outputs,
    "vanilla2": _brute_atom_energies,
}


def test_registry_configuration_and_weights_name_the_same_strategies() -> None:
    others = {"schedule", "target_ratio", "weights"}
    assert set(DistillConfig.model_fields) - others == set(NAMES)
    assert STRATEGIES.names()[: len(NAMES) + 1] == ("none", *NAMES)
    for name in NAMES:
        cls = load_strategy(name)
        assert cls.name == name
        assert getattr(DistillConfig(), name) == cls.default_weight


@pytest.mark.parametrize("name", OF_ONE_PASS)
def test_loss_equals_loops_over_atoms(name: str, case: Case) -> None:
    strategy = load_strategy(name)(_setting())
    expected = BRUTE_FORCE[name](strategy, case)
    assert strategy.loss(case.output, case.batch).item() == pytest.approx(
        expected, rel=1e-5
    )


def _agreeing(name: str) -> tuple[Strategy, Case]:
    """A student of the teacher's width that says what the store holds."""
    case = _case(student=T)
    strategy = load_strategy(name)(_setting(student=T))
    if isinstance(strategy.adapter, torch.nn.Linear):
        torch.nn.init.eye_(strategy.adapter.weight)
        if strategy.adapter.bias is not None:
            torch.nn.init.zeros_(strategy.adapter.bias)
    output, batch, units = case.output, case.batch, teacher_normalizer()
    batch.node_features = output.node_features.clone()
    batch.edge_to_node_features = output.node_features.clone()
    assert output.vector_features is not None
    batch.vector_features = output.vector_features.clone()
    source, target = batch.teacher_edge_index
    vectors = output.vector_features
    batch.edge_features = (vectors[source] * vectors[target]).sum(1)
    batch.per_atom_energy = output.per_atom_energy * units.energy_std
    batch.teacher_energy = units.denormalize_energy(
        output.energy, batch.atomic_numbers, batch.batch
    )
    assert output.forces is not None
    batch.teacher_forces = units.denormalize_forces(output.forces)
    return strategy, case


@pytest.mark.parametrize("name", OF_ONE_PASS)
def test_loss_vanishes_for_a_student_that_agrees(name: str) -> None:
    strategy, case = _agreeing(name)
    assert strategy.loss(case.output, case.batch).item() == pytest.approx(0, abs=2e-5)


STUDENT_SIDE = {
    "n2n": ["node_features"],
    "e2n": ["node_features"],
    "v2v": ["vector_features"],
    "e2e": ["vector_features"],
    "vanilla1": ["energy", "forces"],
    "vanilla2": ["per_atom_energy"],
}


@pytest.mark.parametrize("name", OF_ONE_PASS)
def test_gradient_reaches_student_and_adapter(name: str, case: Case) -> None:
    strategy = load_strategy(name)(_setting())
    leaves = {k: leaf for k, leaf in vars(case.output).items() if leaf is not None}
    for leaf in leaves.values():
        leaf.requires_grad_()
    strategy.loss(case.output, case.batch).backward()
    reached = {key for key, leaf in leaves.items() if leaf.grad is not None}
    assert reached == set(STUDENT_SIDE[name])
    for key in reached:
        assert leaves[key].grad.isfinite().all()
        assert leaves[key].grad.abs().sum() > 0
    for parameter in () if strategy.adapter is None else strategy.adapter.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["n2n", "e2n", "v2v", "vanilla2"])
def test_fixed_atoms_count_in_feature_losses(name: str, case: Case) -> None:
    strategy = load_strategy(name)(_setting())
    before = strategy.loss(case.output, case.batch).item()
    case.batch.fixed = ~case.batch.fixed
    assert strategy.loss(case.output, case.batch).item() == before


def test_fixed_atoms_do_not_count_in_force_terms(case: Case) -> None:
    strategy = load_strategy("vanilla1")(_setting())
    before = strategy.loss(case.output, case.batch).item()
    case.batch.teacher_forces[FIXED] += 100.0
    assert strategy.loss(case.output, case.batch).item() == before
    case.batch.teacher_forces[0] += 100.0
    assert strategy.loss(case.output, case.batch).item() > before + 1


def test_v2v_does_not_see_a_joint_rotation(case: Case) -> None:
    strategy = load_strategy("v2v")(_setting())
    before = strategy.loss(case.output, case.batch).item()
    generator = np.random.default_rng(2)
    rotation, _ = np.linalg.qr(generator.normal(size=(3, 3)))
    turn = torch.from_numpy(rotation).float()
    assert case.output.vector_features is not None
    case.output.vector_features = torch.einsum(
        "xy,nyc->nxc", turn, case.output.vector_features
    )
    one_sided = strategy.loss(case.output, case.batch).item()
    assert one_sided != pytest.approx(before, rel=1e-2)
    case.batch.vector_features = torch.einsum(
        "xy,nyc->nxc", turn, case.batch.vector_features
    )
    both = strategy.loss(case.output, case.batch).item()
    assert both == pytest.approx(before, rel=1e-5)


def _with_edge_states(case: Case) -> Strategy:
    """The strategy of a student that has edge states, which ``case`` gets."""
    generator = np.random.default_rng(21)
    edges = case.batch.teacher_edge_index.shape[1]
    case.output.edge_features = _random(generator, edges, S + 1)
    case.batch.edge_mismatch = ""
    widths = {"node_features": S, "vector_features": S, "edge_features": S + 1}
    return load_strategy("e2e")(replace(_setting(), student_widths=widths))


def test_edge_states_of_a_student_are_compared_edge_by_edge(case: Case) -> None:
    strategy = _with_edge_states(case)
    matrix, offset = _weights(strategy)
    own = case.output.edge_features
    assert own is not None
    total = 0.0
    for number in range(len(own)):
        mapped = matrix @ own[number].double().numpy() + offset
        wanted = case.batch.edge_features[number].double().numpy()
        total += float(((mapped - wanted) ** 2).sum())
    expected = total / (len(own) * T)
    own.requires_grad_()
    assert case.output.vector_features is not None
    case.output.vector_features.requires_grad_()
    loss = strategy.loss(case.output, case.batch)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert own.grad is not None
    assert own.grad.abs().sum() > 0
    assert case.output.vector_features.grad is None


def test_edge_states_on_other_edges_are_refused_by_sample(case: Case) -> None:
    strategy = _with_edge_states(case)
    case.batch.edge_mismatch = "7_3"
    with pytest.raises(DataError, match=r"'a student' .* sample '7_3' differ; set"):
        strategy.loss(case.output, case.batch)


def test_invariants_need_no_equal_graphs(case: Case) -> None:
    strategy = load_strategy("e2e")(_setting())
    case.batch.edge_mismatch = "7_3"
    expected = _brute_edges(strategy, case)
    found = strategy.loss(case.output, case.batch).item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_e2e_needs_edge_states_or_vectors() -> None:
    setting = replace(_setting(), student_widths={"node_features": S})
    with pytest.raises(SpecError, match="'e2e' needs 'vector_features' of the student"):
        load_strategy("e2e")(setting)


def test_adapters_depend_on_the_seed_only_and_leave_other_random_numbers() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = load_strategy("n2n")(_setting())
    assert torch.equal(torch.rand(3), expected)
    second = load_strategy("n2n")(_setting())
    assert np.array_equal(_weights(first)[0], _weights(second)[0])
    assert _weights(first)[0].std() > 0


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ("e2n", ["'e2n'", "'edge_to_node_features'", "edge_to_node_features: {}"]),
        ("e2e", ["'e2e'", "'edge_features'", "edge_features: {}"]),
    ],
)
def test_missing_field_is_named_with_the_line_to_add(
    strategy: str, words: list[str], small_store: FeatureStore
) -> None:
    with pytest.raises(SpecError) as error:
        make_learner(train_config(strategy=strategy), small_store)
    assert all(word in str(error.value) for word in [*words, "features:"])


@pytest.mark.parametrize("strategy", ["vanilla1", "vanilla2", "n2n"])
def test_labels_cannot_distil(strategy: str, labels_store: FeatureStore) -> None:
    with pytest.raises(SpecError, match=f"Strategy '{strategy}' needs") as error:
        make_learner(train_config(strategy=strategy), labels_store)
    wanted = "teacher:" if strategy == "vanilla1" else "features:"
    assert wanted in str(error.value)


def test_v2v_needs_a_student_with_vectors(small_store: FeatureStore) -> None:
    config = train_config("schnet-demo", strategy="n2n+v2v")
    with pytest.raises(SpecError, match=r"'v2v' needs 'vector_features'.*schnet-demo"):
        make_learner(config, small_store)


def test_fields_of_joined_strategies_are_read_once(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    config = train_config(strategy="vanilla2+n2n+vanilla1")
    learner = make_learner(config, small_store)
    assert sorted(learner.fields) == sorted(
        {"per_atom_energy", "node_features", "teacher_energy", "teacher_forces"}
    )
    assert set(learner.adapters) == {"n2n"}
    widths: dict[str, Any] = {
        name: tuple(p.shape) for name, p in learner.adapters.named_parameters()
    }
    assert widths == {"n2n.weight": (16, 8), "n2n.bias": (16,)}
