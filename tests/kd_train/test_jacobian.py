"""The strategy jacobian: against automatic differentiation, and beside other terms."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from kd_train.strategies.displaced import Displacements, append_displaced
from kd_train.strategies.jacobian import ForceJacobian
from kd_train.trainer.trainer import Trainer
from pipeline.errors import SpecError
from pipeline.store.reader import FeatureStore
from tests.frames import collision_frames, frame, write_frames
from tests.kd_train.runs import make_run
from tests.stores import build, spec_document, train_config, write_spec


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path) -> FeatureStore:
    """Columns of samples of several sizes, one with fixed atoms; copies without."""
    folder = tmp_path_factory.mktemp("jacobian")
    held = frame(
        "held",
        list("OHH"),
        [[0, 0, 0], [0.96, 0, 0], [-0.3, 0.9, 0]],
        columns={"fixed": ("I", [1, 0, 0])},
        energy=-138.0,
        forces=[[0, 0, 0]] * 3,
    )
    data = write_frames(folder / "d.extxyz", [*collision_frames(30), held])
    source = {"format": "extxyz", "path": str(data)}
    document = spec_document(
        {
            "train": source,
            "copies": {
                **source,
                "limit": 6,
                "labels": "none",
                "features": False,
                "generate": {"method": "rattle", "copies": 2, "sigma": 0.02},
            },
        },
        folder / "s.zarr",
        teacher_file,
        {"force_jacobian": {"columns": 4}, "node_features": {}, "per_atom_energy": {}},
    )
    return build(write_spec(folder / "s.yaml", document))


def _run(store: FeatureStore, folder: Path, **changes: Any) -> Trainer:
    changes = {"strategy": "jacobian", "val_split": "train"} | changes
    return make_run(store, folder, train_config(**changes))


def _batch(run: Trainer, positions: list[int]) -> Data:
    return run.on_device(run.train_samples.batch(np.array(positions)))


def _term(run: Trainer) -> ForceJacobian:
    (found,) = [s for s in run.learner.strategies if isinstance(s, ForceJacobian)]
    return found


def _exact(run: Trainer, batch: Data) -> float:
    """The term by autograd in double precision, with a loop over columns and atoms."""
    model = copy.deepcopy(run.learner.student).double().train()
    real = copy.copy(batch)
    real.cell, real.cell_offsets = batch.cell.double(), batch.cell_offsets.double()

    slopes = _slopes(model, real, batch.positions.double())
    ends = [0, *batch.natoms.cumsum(0).tolist()]
    errors = []
    for graph, column, slot in batch.jacobian_choice.T.tolist():
        moved = ends[graph] + column // 3
        for atom in range(ends[graph], ends[graph + 1]):
            if not batch.fixed[atom]:
                own = slopes[atom, :, moved, column % 3]
                wanted = batch.force_jacobian[atom, slot].double()
                wanted = wanted / run.learner.normalizer.force_std
                errors.append(float((own - wanted).norm()))
    return float(np.mean(errors))


def _slopes(model: Any, batch: Data, positions: torch.Tensor) -> torch.Tensor:
    """∂F/∂x (N, 3, N, 3) of direct forces, or minus the Hessian of the energy."""

    def forces(positions: torch.Tensor) -> torch.Tensor:
        batch.positions = positions
        return model(batch).forces

    def energy(positions: torch.Tensor) -> torch.Tensor:
        return model._energy(batch, positions, {})[0].sum()

    if model.hyperparameters.get("direct_forces", False):
        return torch.autograd.functional.jacobian(forces, positions)
    return -torch.autograd.functional.hessian(energy, positions)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "gradient"])
@pytest.mark.parametrize("difference", ["one_sided", "central"])
def test_the_term_is_that_of_automatic_differentiation(
    store: FeatureStore, tmp_path: Path, difference: str, direct: bool
) -> None:
    config = train_config(
        strategy="jacobian",
        val_split="train",
        jacobian={"fraction": 1.0, "difference": difference, "step": 0.01},
    )
    hyperparameters = {**config.student.hyperparameters, "direct_forces": direct}
    student = config.student.model_copy(update={"hyperparameters": hyperparameters})
    run = make_run(store, tmp_path, config.model_copy(update={"student": student}))
    batch = _batch(run, list(range(8)))
    assert batch.jacobian_choice.shape == (3, 8)
    found = float(run.losses(batch)["jacobian"].detach())
    # The error of a one-sided difference is of first order in the step.
    tolerance = 1e-3 if difference == "central" else 2e-2
    assert found == pytest.approx(_exact(run, batch), rel=tolerance)


def test_rows_would_be_wrong_for_direct_forces(
    store: FeatureStore, tmp_path: Path
) -> None:
    """The student's own Jacobian is not symmetric, so a row is no column."""
    run = _run(store, tmp_path)
    batch = _batch(run, [0])
    model = copy.deepcopy(run.learner.student)

    def forces(positions: torch.Tensor) -> torch.Tensor:
        moved = copy.copy(batch)
        moved.positions = positions
        return model(moved).forces

    slopes = torch.autograd.functional.jacobian(forces, batch.positions)
    square = slopes.reshape(batch.positions.numel(), -1)
    assert (square - square.T).norm() > 0.05 * square.norm()


def test_other_terms_do_not_notice_it(store: FeatureStore, tmp_path: Path) -> None:
    both = _run(store, tmp_path / "a", strategy="n2n+vanilla2+jacobian")
    alone = _run(store, tmp_path / "b", strategy="n2n+vanilla2")
    positions = [5, 30, 2, 11]
    first = both.losses(_batch(both, positions))
    second = alone.losses(_batch(alone, positions))
    for name in ("l0", "n2n", "vanilla2"):
        one, other = first[name].detach(), second[name].detach()
        assert float(one) == pytest.approx(float(other), rel=1e-5)
    first["l0"].backward()
    second["l0"].backward()
    for one, other in zip(
        both.learner.student.parameters(),
        alone.learner.student.parameters(),
        strict=True,
    ):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)


def test_fixed_atoms_neither_move_nor_count(
    store: FeatureStore, tmp_path: Path
) -> None:
    run = _run(store, tmp_path, jacobian={"fraction": 1.0})
    (place,) = np.flatnonzero(store.splits["train"].sample_ids == "held")
    batch = _batch(run, [int(place)])
    (_, column, _) = batch.jacobian_choice[:, 0].tolist()
    assert column >= 3
    assert _term(run).counts(batch).tolist() == [2.0]
    found = float(run.losses(batch)["jacobian"].detach())
    assert found == pytest.approx(_exact(run, batch), rel=2e-2)


def test_the_choice_is_random_repeatable_and_of_the_stored_columns(
    store: FeatureStore, tmp_path: Path
) -> None:
    run = _run(store, tmp_path, jacobian={"fraction": 0.5, "columns": 2})
    seen: set[tuple[int, ...]] = set()
    for draw in range(20):
        batch = run.train_samples.batch(np.arange(8))
        _term(run).prepare(batch, (0, draw, 0))
        again = run.train_samples.batch(np.arange(8))
        _term(run).prepare(again, (0, draw, 0))
        assert torch.equal(batch.jacobian_choice, again.jacobian_choice)
        graphs, columns, slots = batch.jacobian_choice.tolist()
        assert len(set(graphs)) == 4
        assert set(slots) <= {0, 1}
        stored = batch.force_jacobian_column
        assert columns == [
            int(stored[g, s]) for g, s in zip(graphs, slots, strict=True)
        ]
        seen.add(tuple(graphs))
    assert len(seen) > 10


def test_splits_without_columns_join_in(store: FeatureStore, tmp_path: Path) -> None:
    """Copies are trained on by the teacher's labels, their columns are not known."""
    run = _run(store, tmp_path, train_split="train+copies", jacobian={"fraction": 1.0})
    count = len(store.splits["train"])
    batch = _batch(run, [0, count, count + 3, 4])
    assert sorted(batch.jacobian_choice[0].tolist()) == [0, 3]
    only = _batch(run, [count, count + 1])
    losses = run.losses(only)
    assert float(losses["jacobian"].detach()) == 0
    assert float(losses["l0"].detach()) > 0
    losses["loss"].backward()
    with pytest.raises(SpecError, match=r"lacks; .*'force_jacobian: \{columns: 4\}'"):
        _run(store, tmp_path / "b", train_split="copies")


def test_a_resumed_run_repeats_its_choices(store: FeatureStore, tmp_path: Path) -> None:
    constant = {"kind": "constant", "warmup_steps": 0}
    whole = _run(store, tmp_path / "a", steps=6, eval_every=3, schedule=constant)
    whole.train()
    half = _run(store, tmp_path / "b", steps=3, eval_every=3, schedule=constant)
    half.train()
    rest = _run(store, tmp_path / "b", steps=6, eval_every=3, schedule=constant)
    rest.train(resume=True, extend=True)
    for one, other in zip(
        whole.learner.student.parameters(),
        rest.learner.student.parameters(),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_copies_keep_the_edges_and_move_one_coordinate(
    store: FeatureStore, tmp_path: Path
) -> None:
    run = _run(store, tmp_path)
    batch = _batch(run, [1, 7, 3])
    moves = Displacements(
        torch.tensor([2, 0]), torch.tensor([4, 0]), torch.tensor([0.5, -0.25])
    )
    found = append_displaced(batch, moves)
    sizes = batch.natoms.tolist()
    assert found.natoms.tolist() == [*sizes, sizes[2], sizes[0]]
    assert found.num_graphs == 5
    edges = torch.bincount(found.batch[found.edge_index[1]])
    assert edges[3:].tolist() == edges[[2, 0]].tolist()
    last = batch.positions[sum(sizes[:2]) :].clone()
    last[1, 1] += 0.5
    torch.testing.assert_close(
        found.positions[sum(sizes) : sum(sizes) + sizes[2]], last
    )
    first = batch.positions[: sizes[0]].clone()
    first[0, 0] -= 0.25
    torch.testing.assert_close(found.positions[sum(sizes) + sizes[2] :], first)
    assert torch.equal(
        found.batch[found.edge_index[0]], found.batch[found.edge_index[1]]
    )


def test_bfloat16_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="precision: bfloat16 .*jacobian"):
        _run(store, tmp_path, precision="bfloat16")


def test_gemnet_students_keep_their_side_graphs(
    store: FeatureStore, tmp_path: Path
) -> None:
    config = train_config(
        "gemnet-oc-demo",
        strategy="jacobian",
        val_split="train",
        jacobian={"fraction": 1.0, "difference": "central", "step": 0.01},
    )
    run = make_run(store, tmp_path, config)
    batch = _batch(run, [0, 5])
    found = float(run.losses(batch)["jacobian"].detach())
    assert found == pytest.approx(_exact(run, batch), rel=1e-2)
