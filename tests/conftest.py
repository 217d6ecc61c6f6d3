"""Fixtures that tests of both packages share; building them takes about a second.

What they build with is imported inside them, so that tests that use none start fast.
"""

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.frames import collision_frames, write_frames

if TYPE_CHECKING:
    from pipeline.store.reader import FeatureStore

torch.set_num_threads(1)
# No example is too slow: that depends on the machine, and on what else it is at.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

# Shells start what runs in the background deaf to Ctrl-C, which some tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

N_TRAIN = 160
N_VAL = 24


@pytest.fixture(autouse=True)
def _closed_logs() -> Iterator[None]:
    """Take away what a test, or a worker in its process, attaches to our loggers."""
    yield
    for name in ("pipeline", "kd_train"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


@pytest.fixture
def collisions(tmp_path: Path) -> Callable[..., Path]:
    """``collisions(n, first=0, split="train")``: a file of n frames of the demo set."""

    def make(count: int, first: int = 0, split: str = "train") -> Path:
        path = tmp_path / f"{split}_{first}_{count}.extxyz"
        return write_frames(path, collision_frames(count, first, split))

    return make


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of the splits ``train`` and ``val`` of the shared stores."""
    folder = tmp_path_factory.mktemp("datasets")
    return {
        "train": write_frames(folder / "train.extxyz", collision_frames(N_TRAIN)),
        "val": write_frames(
            folder / "val.extxyz.xz", collision_frames(N_VAL, split="val")
        ),
    }


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained PaiNN, 16 channels, with a normaliser of distinct numbers."""
    from tests.stores import save_teacher

    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


@pytest.fixture(scope="session")
def small_spec(
    tmp_path_factory: pytest.TempPathFactory,
    datasets: dict[str, Path],
    teacher_file: Path,
) -> Path:
    """Spec of ``small_store``."""
    from tests.stores import spec_document, write_spec

    folder = tmp_path_factory.mktemp("small")
    document = spec_document(datasets, folder / "small.zarr", teacher_file)
    return write_spec(folder / "small.yaml", document)


@pytest.fixture(scope="session")
def small_store(small_spec: Path) -> "FeatureStore":
    """Sealed store with float32 features in both splits; several blocks in train."""
    from tests.stores import build

    store = build(small_spec)
    assert store.splits["train"].n_blocks >= 3
    return store


@pytest.fixture(scope="session")
def labels_store(
    tmp_path_factory: pytest.TempPathFactory, datasets: dict[str, Path]
) -> "FeatureStore":
    """Sealed store of the same samples without a teacher."""
    from tests.stores import build, spec_document, write_spec

    folder = tmp_path_factory.mktemp("labels")
    document = spec_document(datasets, folder / "labels.zarr")
    return build(write_spec(folder / "labels.yaml", document))


@pytest.fixture(scope="session")
def memorised(
    tmp_path_factory: pytest.TempPathFactory, teacher_file: Path
) -> "FeatureStore":
    """Sealed store whose teacher knows the training labels: it gave them itself."""
    from pipeline.build.label import label_splits
    from pipeline.spec.cache_spec import load_spec
    from tests.stores import build, spec_document, write_spec

    folder = tmp_path_factory.mktemp("memorised")
    data = write_frames(folder / "d.extxyz", collision_frames(24))
    splits = {
        "train": {"format": "extxyz", "path": str(data), "limit": 12},
        "val": {"format": "extxyz", "path": str(data), "offset": 12},
    }
    document = spec_document(splits, folder / "first.zarr", teacher_file)
    file, _ = label_splits(load_spec(write_spec(folder / "s.yaml", document)), folder)
    splits["train"] = {"format": "extxyz", "path": str(file)}
    document = spec_document(splits, folder / "s.zarr", teacher_file)
    return build(write_spec(folder / "s.yaml", document))
