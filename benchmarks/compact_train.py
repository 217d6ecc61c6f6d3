"""Students trained from stores of one teacher that differ in precision only."""

import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import click
import numpy as np
from compare import train

from kd_train.loader.data import CachedSamples
from pipeline.graphs.neighbors import NeighborSpec
from pipeline.store.reader import FeatureStore

FIELDS = {
    "n2n": "node_features",
    "e2n": "edge_to_node_features",
    "v2v": "vector_features",
}
Found = dict[tuple[str, str], list[dict[str, float]]]
METRICS = {"energy_mae": "energy MAE [meV]", "forces_mae": "force MAE [meV/Å]"}


def loaded_dtype(store: Path, strategy: str) -> str:
    """Dtype in which the loader of students hands over the field of a strategy."""
    split = FeatureStore.open(store).splits["train"]
    field = FIELDS[strategy]
    rule = NeighborSpec(cutoff=5.0, max_neighbors=50, symmetric=False)
    samples = CachedSamples(split, rule, range(1, 100), [field])
    return str(samples.batch(np.array([0]))[field].dtype).removeprefix("torch.")


def run_all(
    stores: Sequence[Path],
    out: Path,
    options: Sequence[str],
    strategies: Sequence[str],
    seeds: Sequence[str],
    jobs: int,
) -> Found:
    """Metrics of every seed by strategy and store; finished runs are not repeated."""
    cases = list(product(seeds, strategies, stores))
    folders = [out / f"{s}-{store.stem}-s{seed}" for seed, s, store in cases]
    arguments = [
        ["--cache", str(store), "--strategy", s, "--seed", seed, *options]
        for seed, s, store in cases
    ]
    with ThreadPoolExecutor(jobs) as pool:
        failures = [f for f in pool.map(train, folders, arguments) if f is not None]
    if failures:
        raise click.ClickException("; ".join(failures))
    found: Found = {}
    for (_, strategy, store), folder in zip(cases, folders, strict=True):
        metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
        found.setdefault((strategy, store.stem), []).append(metrics)
    return found


def train_table(found: Found, stores: Sequence[str]) -> list[str]:
    """Mean and standard deviation over seeds, and the paired difference to the first.

    A difference within the spread of the first store's seeds is noise.
    """
    first = stores[0]
    lines = []
    for metric, title in METRICS.items():
        lines.append(f"{title:20} " + "".join(f"{name:>22}" for name in stores))
        for strategy in dict.fromkeys(s for s, _ in found):
            cells = [_cell([run[metric] for run in found[strategy, first]])]
            for name in stores[1:]:
                pairs = zip(found[strategy, name], found[strategy, first], strict=True)
                values = [run[metric] for run in found[strategy, name]]
                moved = [one[metric] - other[metric] for one, other in pairs]
                cells.append(f"{_cell(values)} ({statistics.mean(moved):+.1f})")
            lines.append(f"  {strategy:18} " + "".join(f"{cell:>22}" for cell in cells))
    lines.append("In brackets: mean difference to the first store, seed by seed.")
    return lines


def _cell(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {spread:.1f}"
