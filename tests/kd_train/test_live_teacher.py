"""Training from the cache is training with the teacher in the loop."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kd_train.trainer.trainer import Trainer
from pipeline.fields import PREDICTION_FIELDS
from pipeline.spec.sections import TeacherSpec
from pipeline.store.reader import FeatureStore
from pipeline.structure import Sample
from pipeline.teachers.runner import TeacherRunner
from tests.kd_train.live import assert_trains_alike, samples_by_id, with_live_teacher
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
def teacher(teacher_file: Path) -> TeacherRunner:
    return TeacherRunner.load(TeacherSpec(model="painn", checkpoint=str(teacher_file)))


@pytest.fixture(scope="module")
def sources(datasets: dict[str, Path]) -> dict[str, Sample]:
    return samples_by_id(datasets["train"])


@pytest.mark.parametrize(("student", "strategy"), CASES)
def test_cached_and_live_teacher_train_alike(
    student: str,
    strategy: str,
    small_store: FeatureStore,
    teacher: TeacherRunner,
    sources: dict[str, Sample],
    tmp_path: Path,
) -> None:
    config = train_config(student, strategy=strategy, steps=STEPS)
    assert_trains_alike(
        config, small_store, teacher, sources, tuple(FEATURES), tmp_path, 1e-5
    )


def test_comparison_would_notice_swapped_samples(
    small_store: FeatureStore,
    teacher: TeacherRunner,
    sources: dict[str, Sample],
    tmp_path: Path,
) -> None:
    """The tolerance above is far below what wrong features would change."""
    config = train_config(strategy="n2n+v2v+vanilla1+vanilla2")
    run = Trainer(config, small_store, tmp_path, torch.device("cpu"))
    split = small_store.splits["train"]
    batch = run.on_device(run.train_samples.batch(np.arange(8)))
    ids = [str(name) for name in split.sample_ids[:8]]
    fields = tuple(FEATURES)
    right = run.losses(with_live_teacher(batch, ids, teacher, sources, fields))
    for name in (*PREDICTION_FIELDS, *FEATURES):
        batch[name] = batch[name].flip(0)
    wrong = run.losses(batch)
    for name in config.strategies:
        assert wrong[name].item() != pytest.approx(right[name].item(), rel=1e-4)
