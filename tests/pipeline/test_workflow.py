"""What the rules of stores ask: changes of a spec with blanks, and its data files."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.workflow import data_files, spec_changes
from pipeline.errors import SpecError
from tests.stores import write_spec


@pytest.mark.parametrize(
    ("value", "changes"),
    [
        (None, []),
        ("", []),
        ("store.seed=3", ["store.seed=3"]),
        ("store.seed=3  splits.val=null ", ["store.seed=3", "splits.val=null"]),
        ("teacher.checkpoint=/my data/a b.pt", ["teacher.checkpoint=/my data/a b.pt"]),
        ("a.b=my data.xyz c=1", ["a.b=my data.xyz", "c=1"]),
        (["a=b c=d", "e=#"], ["a=b c=d", "e=#"]),
    ],
)
def test_changes_may_hold_blanks(value: Any, changes: list[str]) -> None:
    """B8: they were cut at every blank."""
    assert spec_changes({"set": value}) == changes
    assert spec_changes({}) == []


@pytest.mark.parametrize("value", [5, {"a": 1}, ["a"], [1], "a", ["a b=1"], "=1"])
def test_what_is_no_change_is_refused(value: Any) -> None:
    with pytest.raises(SpecError, match=r"^--config set"):
        spec_changes({"set": value})


def test_the_files_of_a_store_are_found(tmp_path: Path) -> None:
    """C: rules name the data as inputs, so that a changed file is seen."""
    names = ["a.xyz", "my data/b.xyz", "my data/c.lmdb", "my data/c.lmdb-lock", "t.pt"]
    for name in [*names, "e.json", "other.xyz"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"H": 1}')
    document = {
        "teacher": {"model": "painn", "checkpoint": "t.pt"},
        "splits": {
            "train": {
                "format": "extxyz",
                "path": "a.xyz",
                "reference_energies": "e.json",
            },
            "val": {"format": "oc20_lmdb", "path": "my data"},
            "far": {"format": "extxyz", "path": "https://example.org/x.xyz"},
        },
        "store": {"path": "s.zarr"},
    }
    spec = write_spec(tmp_path / "my spec.yaml", document)
    found = {str(Path(f).relative_to(tmp_path)) for f in data_files(spec, [])}
    assert found == {"a.xyz", "my data/b.xyz", "my data/c.lmdb", "t.pt", "e.json"}
    changed = data_files(spec, ["splits.train.path=other.xyz", "splits.val=null"])
    assert {Path(f).name for f in changed} == {"other.xyz", "t.pt", "e.json"}
    assert data_files(spec, ["splits.train.path=absent.xyz"]) == []
    assert data_files(tmp_path / "absent.yaml", []) == []
