"""A finished run for tests that only look at one."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pipeline.store.reader import FeatureStore


@pytest.fixture(scope="session")
def finished(
    small_store: "FeatureStore", tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of a run of 12 steps, validated every 5; tests must not change it."""
    from tests.kd_train.runs import distilling, make_run

    folder = tmp_path_factory.mktemp("finished")
    make_run(small_store, folder, distilling(eval_every=5)).train(resume=False)
    return folder
