"""What other programs write into a sealed store, and a user's attributes. B6."""

import logging
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr

from pipeline.cli.main import main
from pipeline.errors import DamagedStoreError
from pipeline.store.reader import FeatureStore
from pipeline.store.verify import verify_store
from tests.commands import run_command
from tests.store.toy_store import contents


@pytest.fixture
def copy(sealed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sealed, tmp_path / "copy.zarr"))


def _consolidate(store: Path, path: str | None = None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not part of the standard of Zarr 3
        zarr.consolidate_metadata(store, path=path)


def _with_windows_ends(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("zarr.json", "holds consolidated metadata"),
        ("train/zarr.json", "holds consolidated metadata"),
        ("zarr.json", "has Windows line ends"),
        ("train/structures/positions/zarr.json", "has Windows line ends"),
        ("zarr.json", "was rewritten with other spaces"),
    ],
)
def test_altered_files_are_read_named_and_cleaned(
    copy: Path, file: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """B6: the store was called damaged, and only building it again seemed to help."""
    truth = contents(copy)
    if "consolidated" in what:
        _consolidate(copy, file.rpartition("/")[0] or None)
    elif "Windows" in what:
        _with_windows_ends(copy / file)
    else:
        (copy / file).write_bytes((copy / file).read_bytes() + b"\n")
    with caplog.at_level(logging.WARNING):
        found = FeatureStore.open(copy)
    assert f"{copy}/{file} {what}" in caplog.text
    assert "--repair" in caplog.text
    assert np.isfinite(
        found.splits["train"].read([0], ["labels/energy"])["labels/energy"]
    )
    told = run_command(main, ["verify", copy, "--repair"])
    assert told.exit_code == 1
    assert f"{copy}/{file} {what}, which" in told.stderr
    assert "1 metadata file(s) cleaned" in told.stderr
    assert contents(copy) == truth
    assert run_command(main, ["verify", copy]).exit_code == 0


def test_attributes_of_a_user_may_stay(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in ("", "train", "train/structures", "train/structures/positions"):
        group = zarr.open(copy, path=path, mode="r+")
        group.attrs["note"] = {"mine": ["é", 1.5]}
        group.attrs["more"] = 2
    with caplog.at_level(logging.WARNING):
        FeatureStore.open(copy)
    assert caplog.text == ""
    assert verify_store(copy) == []
    _consolidate(copy)
    assert "consolidated" in run_command(main, ["verify", copy, "--repair"]).stderr
    assert verify_store(copy) == []
    assert zarr.open_group(copy, mode="r").attrs["note"] == {"mine": ["é", 1.5]}


@pytest.mark.parametrize("key", ["unit", "shape"])
def test_changed_meaning_is_damage(copy: Path, key: str) -> None:
    file = copy / "train/structures/positions/zarr.json"
    text = file.read_text()
    new = text.replace('"\\u00c5"', '"nm"') if key == "unit" else text + "x"
    assert new != text
    file.write_text(new)
    with pytest.raises(DamagedStoreError, match="differs from the sealed store"):
        FeatureStore.open(copy)
    assert any("differs from the sealed store" in str(p) for p in verify_store(copy))
