"""Training from the cache is training with the teacher in the loop."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from kd_train.loop import Run
from pipeline.datasets import open_dataset
from pipeline.fields import PREDICTION_FIELDS
from pipeline.spec import TeacherSpec
from pipeline.store.reader import FeatureStore
from pipeline.structure import Sample
from pipeline.teacher import Teacher
from tests.stores import FEATURES, train_config

STEPS = 20
CASES = [
    ("painn-small-demo", "none"),
    ("painn-small-demo", "n2n"),
    ("painn-small-demo", "v2v"),
    ("painn-small-demo", "vanilla1"),
    ("painn-small-demo", "vanilla2"),
    ("painn-small-demo", "n2n+v2v"),
    ("schnet-demo", "none"),
    ("schnet-demo", "n2n"),
    ("schnet-demo", "vanilla1"),
    ("schnet-demo", "vanilla2"),
]


@pytest.fixture(scope="module")
def teacher(teacher_file: Path) -> Teacher:
    return Teacher.load(TeacherSpec(model="painn", checkpoint=str(teacher_file)))


@pytest.fixture(scope="module")
def sources(datasets: dict[str, Path]) -> dict[str, Sample]:
    """Samples by id, read from the file and not from the store."""
    dataset = open_dataset("extxyz", str(datasets["train"]))
    return {s.sample_id: s for s in map(dataset.__getitem__, range(len(dataset)))}


def _with_live_teacher(
    cached: Data, ids: list[str], teacher: Teacher, sources: dict[str, Sample]
) -> Data:
    live = cached.clone()
    predictions = teacher.predict([sources[i] for i in ids], tuple(FEATURES))
    for name in (*PREDICTION_FIELDS, *FEATURES):
        live[name] = torch.from_numpy(predictions[name])
    return live


@pytest.mark.parametrize(("student", "strategy"), CASES)
def test_cached_and_live_teacher_train_alike(
    student: str,
    strategy: str,
    small_store: FeatureStore,
    teacher: Teacher,
    sources: dict[str, Sample],
    tmp_path: Path,
) -> None:
    config = train_config(student, strategy=strategy, steps=STEPS)
    cached_run, live_run = (
        Run(config, small_store, tmp_path / name, torch.device("cpu"))
        for name in ("cached", "live")
    )
    split = small_store.splits["train"]
    order = np.random.default_rng(5).permutation(len(split))
    for step in range(STEPS):
        positions = order[8 * step : 8 * step + 8]
        batch = cached_run.train_samples.batch(positions)
        ids = [str(split.sample_ids[p]) for p in positions]
        live = _with_live_teacher(batch, ids, teacher, sources)
        from_cache, from_teacher = cached_run.step(batch), live_run.step(live)
        assert from_cache.keys() == from_teacher.keys()
        assert set(from_cache) == {"loss", "l0", *config.strategies}
        for name, value in from_cache.items():
            assert float(value) == pytest.approx(float(from_teacher[name]), rel=1e-5)
            assert float(value) > 0


def test_comparison_would_notice_swapped_samples(
    small_store: FeatureStore,
    teacher: Teacher,
    sources: dict[str, Sample],
    tmp_path: Path,
) -> None:
    """The tolerance above is far below what wrong features would change."""
    config = train_config(strategy="n2n+v2v+vanilla1+vanilla2")
    run = Run(config, small_store, tmp_path, torch.device("cpu"))
    split = small_store.splits["train"]
    batch = run.train_samples.batch(np.arange(8))
    ids = [str(name) for name in split.sample_ids[:8]]
    right = run.losses(_with_live_teacher(batch, ids, teacher, sources))
    for name in (*PREDICTION_FIELDS, *FEATURES):
        batch[name] = batch[name].flip(0)
    wrong = run.losses(batch)
    for name in config.strategies:
        assert wrong[name].item() != pytest.approx(right[name].item(), rel=1e-4)
