"""Runs with C code against runs with torch operations."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch_geometric.data import Data

from kd_train.trainer.checkpoint import read_checkpoint
from pipeline.native.library import find_library
from pipeline.store.reader import FeatureStore
from tests.kd_train.runs import distilling, make_run, metric_rows


@pytest.fixture(autouse=True)
def _compiler() -> None:
    if find_library("painn", torch.float32) is None:
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
