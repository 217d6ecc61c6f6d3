from pathlib import Path

import pytest
import toy_store

from pipeline.store.reader import FeatureStore


@pytest.fixture(scope="session")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed toy store that no test changes."""
    path = tmp_path_factory.mktemp("store") / "toy.zarr"
    toy_store.build(path)
    return path


@pytest.fixture(scope="session")
def store(sealed: Path) -> FeatureStore:
    return FeatureStore.open(sealed)
