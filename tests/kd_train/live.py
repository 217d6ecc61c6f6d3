"""Trains from the cache and with the teacher in the loop, and compares every loss."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from kd_train.config.train_config import TrainConfig
from kd_train.trainer.trainer import Trainer
from pipeline.datasets import open_dataset
from pipeline.fields import PREDICTION_FIELDS
from pipeline.store.reader import FeatureStore
from pipeline.structure import Sample
from pipeline.teachers.runner import TeacherRunner


def samples_by_id(path: Path) -> dict[str, Sample]:
    """Samples by id, read from the file and not from the store."""
    dataset = open_dataset("extxyz", str(path))
    return {s.sample_id: s for s in map(dataset.__getitem__, range(len(dataset)))}


def with_live_teacher(
    cached: Data,
    ids: Sequence[str],
    teacher: TeacherRunner,
    sources: Mapping[str, Sample],
    fields: Sequence[str],
) -> Data:
    """The batch with every number of the teacher's computed here and now."""
    live = cached.clone()
    predictions = teacher.predict([sources[i] for i in ids], tuple(fields))
    for name in (*PREDICTION_FIELDS, *fields):
        if name in cached:
            live[name] = torch.from_numpy(predictions[name])
    return live


def assert_trains_alike(
    config: TrainConfig,
    store: FeatureStore,
    teacher: TeacherRunner,
    sources: Mapping[str, Sample],
    fields: Sequence[str],
    folder: Path,
    relative: float,
) -> None:
    """Every loss of every step is the same from the cache and with ``teacher``."""
    cached_run, live_run = (
        Trainer(config, store, folder / name, torch.device("cpu"))
        for name in ("cached", "live")
    )
    split = store.splits["train"]
    order = np.random.default_rng(5).permutation(len(split))
    for step in range(config.steps):
        positions = order[8 * step : 8 * step + 8]
        batch = cached_run.on_device(cached_run.train_samples.batch(positions))
        ids = [str(split.sample_ids[p]) for p in positions]
        live = with_live_teacher(batch, ids, teacher, sources, fields)
        from_cache, from_teacher = cached_run.step(batch), live_run.step(live)
        assert from_cache.keys() == from_teacher.keys()
        assert set(from_cache) == {"loss", "l0", *config.strategies}
        for name, value in from_cache.items():
            expected = float(from_teacher[name])
            assert float(value) == pytest.approx(expected, rel=relative)
            assert float(value) > 0
