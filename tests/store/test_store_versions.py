"""Stores of every version that was ever written are read, checked and continued.

``tests/fixtures/stores/versionN.zip`` was written by the code of that version from the
splits of ``toy_store`` that it knew: 1 has "val", 2 also "bonds" with its edges, 3 also
"coded" with features as integers, 4 "columns" of the force Jacobian. A new version adds
its own file, made with

    python -c "import toy_store; toy_store.build(path, splits)"
"""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import toy_store

from pipeline.errors import StoreError
from pipeline.store.index import FORMAT_VERSION
from pipeline.store.reader import FeatureStore
from pipeline.store.verify import verify_store
from pipeline.store.writer import StoreWriter

FOSSILS = Path(__file__).parents[1] / "fixtures" / "stores"
VERSIONS = {
    1: ("val",),
    2: ("val", "bonds"),
    3: ("val", "bonds", "coded"),
    4: ("val", "columns"),
}


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def fossil(version: int, tmp_path: Path) -> Path:
    with zipfile.ZipFile(FOSSILS / f"version{version}.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path / "toy.zarr"


def test_there_is_a_fossil_of_every_version():
    assert list(VERSIONS) == list(range(1, FORMAT_VERSION + 1))


def test_it_is_read_and_found_sound(version: int, fossil: Path):
    store = FeatureStore.open(fossil)
    assert store.attributes["format_version"] == version
    assert tuple(store.splits) == VERSIONS[version]
    assert verify_store(fossil) == []
    for name, split in store.splits.items():
        plan = toy_store.plan(name)
        assert list(split.sample_ids) == plan.sample_ids
        for array in plan.arrays:
            order = plan.blocks.order
            values = [toy_store.value_of(name, int(s), array) for s in order]
            got = split.read(np.arange(len(split)), [array.path])[array.path]
            wanted = toy_store.joined(values, array)
            if split.encoding(array.path) is None:
                np.testing.assert_array_equal(got, wanted)
            else:
                assert split.error(array.path) < 1.1 * toy_store.STATED_ERROR
                off = np.square(got - wanted).sum() / np.square(wanted).sum()
                assert off <= 1.001 * split.error(array.path)


def test_its_blocks_can_be_written_again(fossil: Path):
    """In its own version, so that programs of that time can still read it."""
    before = toy_store.contents(fossil)
    (fossil / "val/structures/tags/c/1").write_bytes(b"damaged")
    (problem, *_) = verify_store(fossil)
    assert (problem.split, problem.block) == ("val", 1)
    writer = StoreWriter(fossil)
    writer.discard_block("val", 1)
    plan = toy_store.plan("val")
    rows = toy_store.block_rows("val", plan.blocks, 1, plan.arrays)
    writer.write_block("val", 1, rows)
    writer.seal()
    assert toy_store.contents(fossil) == before


def test_a_version_to_come_is_refused_by_its_number(fossil: Path, tmp_path: Path):
    later = Path(shutil.copytree(fossil, tmp_path / "later.zarr"))
    document = json.loads((later / "zarr.json").read_text())
    document["attributes"]["kd_cache"]["format_version"] = FORMAT_VERSION + 1
    (later / "zarr.json").write_text(json.dumps(document))
    words = (
        f"format version {FORMAT_VERSION + 1}, but this program reads versions up to"
    )
    for opener in (FeatureStore.open, verify_store, StoreWriter):
        with pytest.raises(StoreError, match=words):
            opener(later)
