"""Stores whose every checksum is right and whose content is still wrong."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy_store

from pipeline.store import creation as creation_module
from pipeline.store import rows as rows_module
from pipeline.store.index import ArrayInfo
from pipeline.store.verify import verify_store
from pipeline.store.writer import create_store

PLAN = toy_store.plan("train")


def changed(name: str, position: int, by: int):
    """The toy plan with one number of one index array changed."""
    column = getattr(PLAN.blocks, name).copy()
    column[position] += by
    return replace(PLAN, blocks=replace(PLAN.blocks, **{name: column}))


LAST_OF_BLOCK = int(PLAN.blocks.block_bounds[1]) - 1


@pytest.mark.parametrize(
    ("plan", "fault"),
    [
        (
            replace(PLAN, sample_ids=[*PLAN.sample_ids[1:], PLAN.sample_ids[5]]),
            "has repeated sample ids",
        ),
        (changed("n_atoms", 7, -int(PLAN.blocks.n_atoms[7])), "has a sample without"),
        (changed("start", 7, 1), "has sample starts that do not follow"),
        (changed("start", -1, 10**6), "has samples outside the blocks"),
        (changed("n_atoms", LAST_OF_BLOCK, 2000), "has a sample that crosses a block"),
        (changed("sample_row", 7, 1), "has sample rows that do not follow"),
    ],
)
def test_inconsistent_index_is_found(tmp_path: Path, monkeypatch, plan, fault: str):
    monkeypatch.setattr(creation_module, "check_split", lambda split: None)
    create_store(tmp_path / "toy.zarr", [plan], {})
    _, *problems = verify_store(tmp_path / "toy.zarr")
    index = tmp_path / "toy.zarr/train/index"
    assert any(str(problem).startswith(f"{index} {fault}") for problem in problems)
    assert all(problem.block is None for problem in problems)


def test_values_beyond_the_samples_are_found(tmp_path: Path, monkeypatch):
    fill = property(lambda info: 3 if info.path == "structures/tags" else 0)
    monkeypatch.setattr(ArrayInfo, "fill", fill)
    path = tmp_path / "toy.zarr"
    toy_store.build(path, ("train",))
    problems = verify_store(path)
    found = {problem.file.split("/")[2] for problem in problems}
    # The integer array that is filled with zeros anyway is the only sound one.
    expected = {array.path.split("/")[1] for array in PLAN.arrays}
    assert found == expected - {"atomic_numbers"}
    assert all("in rows that belong to no sample." in str(p) for p in problems)
    assert {p.block for p in problems} <= set(range(PLAN.blocks.n_blocks))


def test_values_that_are_no_numbers_are_found(tmp_path: Path, monkeypatch):
    bad = {"features/node_features": np.nan, "labels/energy": -np.inf}

    def unchecked(index, block, info, rows):
        rows = rows.astype(info.dtype)
        if block == 1 and info.path in bad:
            rows.reshape(len(rows), -1)[-1, 0] = bad[info.path]
        return rows

    monkeypatch.setattr(rows_module, "_check_rows", unchecked)
    path = tmp_path / "toy.zarr"
    toy_store.build(path, ("train",))
    last = PLAN.sample_ids[PLAN.blocks.block_bounds[2] - 1]
    what = f"has NaN or infinite values (samples '{last}' of split 'train')."
    assert [str(problem) for problem in verify_store(path)] == [
        f"{path}/train/labels/energy/c/1 {what}",
        f"{path}/train/features/node_features/c/1/0 {what}",
    ]


def test_sound_shards_in_each_other_s_place_are_found(tmp_path: Path):
    path = tmp_path / "toy.zarr"
    toy_store.build(path, ("train",))
    folder = path / "train/features/node_features/c"
    (folder / "0").rename(folder / "x")
    (folder / "1").rename(folder / "0")
    (folder / "x").rename(folder / "1")
    found = {(problem.block, str(problem)) for problem in verify_store(path)}
    for block in (0, 1):
        what = f"{folder}/{block}/0 does not match its commit record."
        assert (block, what) in found
