"""The example plug-in ``rel`` of benchmarks/strategies: by hand, and in a run."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kd_train.strategies.base import Setting
from pipeline.models.normalizer import Normalizer
from pipeline.models.output import ModelOutput
from pipeline.store.reader import FeatureStore
from tests.kd_train.runs import make_run, metric_rows
from tests.stores import train_config

PLUGINS = Path(__file__).parents[2] / "benchmarks" / "strategies"


@pytest.fixture
def relations(monkeypatch: pytest.MonkeyPatch) -> type:
    monkeypatch.syspath_prepend(str(PLUGINS))
    import kd_rel

    return kd_rel.Relations


def test_it_is_info_nce_over_the_edges(
    relations: type, small_store: FeatureStore, tmp_path: Path
) -> None:
    run = make_run(small_store, tmp_path, train_config(strategy="n2n"))
    batch = run.on_device(run.train_samples.batch(np.arange(2)))
    width = batch.node_features.shape[1]
    setting = Setting(
        "s", {"node_features": 3}, {"node_features": width}, Normalizer(),
        train_config().loss, 0,
    )  # fmt: skip
    term = relations(setting)
    states = torch.randn(len(batch.batch), 3)
    energies = torch.zeros(2), torch.zeros(len(batch.batch))
    output = ModelOutput(energies[0], None, energies[1], states, None)
    mapped = (states @ term.adapter.weight.T).detach().numpy()
    stored = batch.node_features.numpy()
    edges = batch.edge_index.T.tolist()

    def direction(features: np.ndarray, edge: list[int]) -> np.ndarray:
        source, target = edge
        vector = features[target] - features[source]
        return vector / np.linalg.norm(vector)

    total = 0.0
    for edge in edges:
        own = direction(mapped, edge)
        logits = [own @ direction(stored, other) / 0.15 for other in edges]
        total += np.log(np.exp(logits).sum()) - own @ direction(stored, edge) / 0.15
    found = term.totals(output, batch)
    assert float(found.detach()) == pytest.approx(total, rel=1e-4)
    assert term.counts(batch).tolist() == [len(edges)]


def test_it_trains_from_its_folder(small_store: FeatureStore, tmp_path: Path) -> None:
    """As a user installs it: the folder is on the path, the entry point names it."""
    environment = {**os.environ, "PYTHONPATH": f"{PLUGINS}{os.pathsep}{Path.cwd()}"}
    command = [
        *(sys.executable, "-m", "kd_train", "--store", str(small_store.path)),
        *("--strategy", "rel+vanilla2", "--student", "painn-small-demo"),
        *("--steps", "4", "--threads", "1", "--out", str(tmp_path / "run")),
        *("--set", "eval_every=2"),
    ]
    subprocess.run(command, check=True, env=environment)
    rows = metric_rows(tmp_path / "run")
    assert float(rows[-1]["train_rel"]) > 0
    assert float(rows[-1]["weight_rel"]) == 1.0
