"""Runs on the shared stores, and what they leave behind."""

import csv
from pathlib import Path
from typing import Any

import torch

from kd_train.config.train_config import TrainConfig
from kd_train.trainer.trainer import Trainer
from pipeline.store.reader import FeatureStore
from tests.stores import train_config

TIMINGS = ("seconds", "samples_per_second")


def make_run(
    store: FeatureStore, folder: Path, config: TrainConfig | None = None
) -> Trainer:
    """A run on the CPU that has not begun; distilling unless ``config`` says more."""
    return Trainer(config or distilling(), store, folder, torch.device("cpu"))


def distilling(**changes: Any) -> TrainConfig:
    """Configuration with two adapters."""
    return train_config(strategy="n2n+v2v", **changes)


def metric_rows(folder: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without the columns that differ from run to run."""
    with (folder / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]
