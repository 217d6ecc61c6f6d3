"""Runs with C code against runs with torch operations."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_geometric.data import Data

from kd_train.config.sections import OptimizerConfig
from kd_train.trainer.average import MovingAverage
from kd_train.trainer.checkpoint import read_checkpoint
from kd_train.trainer.optimizer import make_optimizer
from kd_train.trainer.update import WeightUpdate
from pipeline.native.library import find_library, native_kernels
from pipeline.store.reader import FeatureStore
from tests.kd_train.runs import distilling, make_run, metric_rows


@pytest.fixture(autouse=True)
def _compiler() -> None:
    if find_library(torch.float32) is None:
        pytest.skip("there is no C compiler")


def test_runs_agree_to_rounding(small_store: FeatureStore, tmp_path: Path) -> None:
    losses, weights = [], []
    for native in (False, True):
        folder = tmp_path / str(native)
        config = distilling(steps=6, eval_every=3, native_kernels=native)
        make_run(small_store, folder, config).train()
        losses.append([float(row["val_loss"]) for row in metric_rows(folder)])
        weights.append(load_file(folder / "student.safetensors"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    # Rounding differs, so that C code did run.
    assert any(not torch.equal(weights[0][name], w) for name, w in weights[1].items())


def test_a_resumed_run_continues_bit_for_bit(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    config = distilling(steps=6, eval_every=3, native_kernels=True)
    make_run(small_store, tmp_path / "whole", config).train()
    run = make_run(small_store, tmp_path / "resumed", config)
    step = run.step

    def interrupted(*batches: Data) -> dict[str, Tensor]:
        if run.progress.step == 4:
            raise KeyboardInterrupt
        return step(*batches)

    run.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.train()
    make_run(small_store, tmp_path / "resumed", config).train(resume=True)
    whole, resumed = (
        read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "resumed")
    )
    for part in ("modules", "average"):
        assert all(torch.equal(whole[part][n], w) for n, w in resumed[part].items())


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_update_is_that_of_torch(amsgrad: bool, clip_norm: float | None) -> None:
    options = OptimizerConfig(
        lr=0.01,
        amsgrad=amsgrad,
        weight_decay=0.1,
        weight_decay_on="matrices",
        clip_norm=clip_norm,
    )
    found = []
    for native in (False, True):
        torch.manual_seed(0)
        modules = nn.ModuleDict({"a": nn.Linear(5, 7), "b": nn.Linear(3, 50)})
        optimizer = make_optimizer(modules, options)
        average = MovingAverage(modules, 0.9)
        update = WeightUpdate(modules, optimizer, average, clip_norm)
        for step in range(5):
            update.clear_gradients()
            for number, parameter in enumerate(modules.parameters()):
                # The last weight begins late, and the first one misses a step.
                if (number, step) not in {(3, 0), (3, 1), (0, 3)}:
                    parameter.grad = torch.randn(parameter.shape)
            with native_kernels(native):
                update()
        state = optimizer.state_dict()["state"]
        found.append((modules.state_dict(), average.state_dict(), state))
    for torchs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs)


def test_update_continues_with_the_state_that_is_loaded() -> None:
    modules = nn.ModuleDict({"a": nn.Linear(5, 7)})
    optimizer = make_optimizer(modules, OptimizerConfig())
    update = WeightUpdate(modules, optimizer, MovingAverage(modules, 0.9), None)
    for _ in range(3):
        for parameter in modules.parameters():
            parameter.grad = torch.ones_like(parameter)
        with native_kernels(True):
            update()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps = [entry["step"].item() for entry in optimizer.state.values()]
    assert steps == [3.0, 3.0]
