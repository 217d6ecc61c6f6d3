"""Students trained from stores of one teacher that differ in precision only."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from compare import train

from kd_train.data import CachedSamples
from pipeline.graphs.neighbors import GraphRule
from pipeline.store.reader import FeatureStore

FIELDS = {
    "n2n": "node_features",
    "e2n": "edge_to_node_features",
    "v2v": "vector_features",
}
METRICS = {"energy_mae": "energy MAE [meV]", "forces_mae": "force MAE [meV/Å]"}


def loaded_dtype(store: Path, strategy: str) -> str:
    """Dtype in which the loader of students hands over the field of a strategy."""
    split = FeatureStore.open(store).splits["train"]
    field = FIELDS[strategy]
    rule = GraphRule(cutoff=5.0, max_neighbors=50)
    samples = CachedSamples(split, rule, range(1, 100), [field])  # type: ignore[arg-type]
    return str(samples.batch(np.array([0]))[field].dtype).removeprefix("torch.")


def run_all(
    stores: Sequence[Path],
    out: Path,
    config: Path,
    strategies: Sequence[str],
    seeds: Sequence[int],
    steps: int,
) -> dict[tuple[str, str], list[dict[str, float]]]:
    """Metrics of every seed by strategy and store; finished runs are not repeated."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in seeds:
        for strategy in strategies:
            for store in stores:
                folder = out / f"{strategy}-{store.stem}-s{seed}"
                arguments = ["--cache", str(store), "--strategy", strategy]
                arguments += ["--student", "painn-small-demo", "--threads", "1"]
                arguments += ["--config", str(config), "--seed", str(seed)]
                arguments += ["--set", f"steps={steps}", "--set", f"eval_every={steps}"]
                failure = train(folder, arguments)
                if failure is not None:
                    raise click.ClickException(failure)
                metrics = json.loads((folder / "metrics.json").read_text())
                found.setdefault((strategy, store.stem), []).append(metrics)
    return found
