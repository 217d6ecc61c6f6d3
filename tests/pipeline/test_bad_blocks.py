"""Samples and blocks that cannot be made: named, left out, or done in parts."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.build.build import build_store, plan_store
from pipeline.build.inputs import BuildInputs
from pipeline.build.status import BuildStatus
from pipeline.build.worker import Block, BlockWorker, FillOptions
from pipeline.cli.main import main
from pipeline.errors import BusyError, DataError, StoreError
from pipeline.parallel.devices import (
    is_device_failure,
    is_out_of_memory,
    run_halving_on_oom,
)
from pipeline.spec.cache_spec import load_spec
from pipeline.store.reader import FeatureStore
from pipeline.store.writer import StoreWriter
from pipeline.structure import Sample
from pipeline.teachers.runner import TeacherRunner
from tests.commands import refusal, run_command
from tests.frames import collision_frames, frame, write_frames
from tests.pipeline.builds import shards
from tests.stores import build, spec_document, write_spec

ALONE = frame("alone", ["H"], [[0, 0, 0]], energy=-13.0)
# Taken for one that no device has the memory for.
LARGE = frame("large", ["H", "H"], [[0, 0, 0], [1, 0, 0]], energy=-30.0)
# A cell without height: found out when its graph is made, or distances are looked at.
FLAT = frame(
    "flat",
    ["H", "H"],
    [[0, 0, 0], [1, 0, 0]],
    energy=-30.0,
    header='Lattice="9 0 0 0 9 0 0 0 0.0001" pbc="T T T"',
)
HEAVY = frame("heavy", ["U", "H"], [[0, 0, 0], [1, 0, 0]], energy=-13.0)


def _spec(
    tmp_path: Path, frames: Sequence[str], teacher: Path | None, **split: Any
) -> Path:
    data = write_frames(tmp_path / f"{len(frames)}.extxyz", frames)
    section = {"format": "extxyz", "path": str(data), **split}
    store = tmp_path / f"{len(frames)}.zarr"
    return write_spec(
        tmp_path / f"{len(frames)}.yaml",
        spec_document({"train": section}, store, teacher),
    )


def test_skipped_samples_leave_the_store_of_all_others(
    tmp_path: Path, teacher_file: Path
) -> None:
    sound = collision_frames(40)
    whole = build(_spec(tmp_path, sound, teacher_file))
    mixed = [*sound[:3], ALONE, *sound[3:30], HEAVY, *sound[30:]]
    spec = _spec(tmp_path, mixed, teacher_file, on_bad_sample="skip")
    said = run_command(main, ["build", spec, "--device", "cpu"])
    assert "2 of 42 samples are left out: 'alone', 'heavy'" in said.stderr
    found = FeatureStore.open(tmp_path / "42.zarr")
    assert found.fingerprint == whole.fingerprint
    assert shards(found.path) == shards(whole.path)
    told = found.attributes["provenance"]["bad_samples"]["train"]
    assert [name for name, _ in told] == ["alone", "heavy"]
    assert "no neighbours" in told[0][1]
    assert "atomic number 92" in told[1][1]
    info = json.loads(run_command(main, ["info", found.path, "--json"]).stdout)
    assert info["left_out"] == {"train": 2}
    words = run_command(main, ["info", found.path]).stdout
    assert ["train", *["40"] * 3, "none", *"HCO", "2"] in map(
        str.split, words.splitlines()
    )
    # Continued, it is planned without them again; workers are told by the store.
    StoreWriter(found.path).discard_block("train", 0)
    assert build_store(load_spec(spec))
    assert shards(found.path) == shards(whole.path)


def test_skipping_nothing_changes_nothing(tmp_path: Path, teacher_file: Path) -> None:
    frames = collision_frames(5)
    plain = build(_spec(tmp_path, frames, teacher_file))
    spec = _spec(tmp_path, frames, teacher_file, on_bad_sample="skip")
    assert build_store(load_spec(spec))
    assert "bad_samples" not in plain.attributes["provenance"]


def test_splits_of_bad_samples_only_are_refused(
    tmp_path: Path, teacher_file: Path
) -> None:
    spec = _spec(tmp_path, [ALONE, HEAVY], teacher_file, on_bad_sample="skip")
    assert "none of its 2 samples" in refusal(main, ["build", spec])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (HEAVY, "'heavy' holds"),
        (ALONE, "'alone' has no neighbours"),
        (FLAT, "'flat': The cell"),
    ],
)
def test_what_planning_sees_is_refused_before_anything_is_written(
    bad: str, words: str, tmp_path: Path, teacher_file: Path
) -> None:
    sound = collision_frames(40)
    # Not among the eight samples of the first look.
    spec = _spec(tmp_path, [*sound[:3], bad, *sound[3:]], teacher_file)
    assert words in refusal(main, ["build", spec, "--device", "cpu"])
    assert not (tmp_path / "41.zarr").exists()


def test_all_blocks_but_the_bad_one_are_written(
    tmp_path: Path, teacher_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = TeacherRunner.predict

    def failing(
        self: TeacherRunner, samples: Sequence[Sample], fields: Sequence[str]
    ) -> Any:
        if any(sample.sample_id == "large" for sample in samples):
            raise DataError("Sample 'large' does not fit.")
        return predict(self, samples, fields)

    monkeypatch.setattr(TeacherRunner, "predict", failing)
    sound = collision_frames(300)
    spec = _spec(tmp_path, [*sound[:3], LARGE, *sound[3:]], teacher_file)
    said = refusal(main, ["build", spec, "--device", "cpu"])
    store = FeatureStore.open(tmp_path / "301.zarr", allow_unsealed=True)
    split = store.splits["train"]
    assert split.n_blocks >= 4
    (bad,) = split.missing_blocks()
    assert f"1 of {split.n_blocks} blocks" in said
    assert f"block {bad} of split 'train' (Sample 'large' does not fit" in said
    assert split.position("large") in split.index.block_positions(bad)
    told = json.loads((tmp_path / "301.zarr.status.json").read_text())
    assert told["state"] == "failed"
    assert list(told["failed_blocks"]) == [f"block {bad} of split 'train'"]
    assert told["blocks_done"] == split.n_blocks - 1


def test_builds_that_only_fail_end_soon(
    tmp_path: Path, teacher_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def failing(
        self: BuildInputs, writer: Any, split: str, block: int, before: Any
    ) -> int:
        asked.append(block)
        raise DataError("Sample 'x' is bad.")

    monkeypatch.setattr(BuildInputs, "fill_block", failing)
    spec = load_spec(_spec(tmp_path, collision_frames(300), teacher_file))
    with pytest.raises(DataError, match="3 of "):
        build_store(spec)
    assert 3 <= len(asked) <= 5


def test_a_cpu_makes_one_block_at_a_time(
    tmp_path: Path, teacher_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two would need the memory of two and wait for each other."""
    fill = BuildInputs.fill_block
    now: list[int] = []
    most: list[int] = []

    def watched(
        self: BuildInputs, writer: Any, split: str, block: int, before: Any
    ) -> int:
        now.append(block)
        most.append(len(now))
        time.sleep(0.1)
        done = fill(self, writer, split, block, before)
        now.remove(block)
        return done

    monkeypatch.setattr(BuildInputs, "fill_block", watched)
    build_store(load_spec(_spec(tmp_path, collision_frames(300), teacher_file)))
    assert len(most) > 1
    assert max(most) == 1


def test_a_dataset_that_comes_back_is_read_again(
    tmp_path: Path, teacher_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network fails at some reads; the store is that of an undisturbed build."""
    spec = _spec(tmp_path, collision_frames(300), teacher_file)
    whole = build(spec)
    files = shards(whole.path)
    StoreWriter(whole.path).discard_block("train", 1)
    StoreWriter(whole.path).discard_block("train", 2)
    fill = BuildInputs.fill_block
    failures = {1: 1, 2: 9}

    def failing(
        self: BuildInputs, writer: Any, split: str, block: int, before: Any
    ) -> int:
        failures[block] -= 1
        if failures[block] >= 0:
            raise OSError(5, "Input/output error")
        return fill(self, writer, split, block, before)

    monkeypatch.setattr(BuildInputs, "fill_block", failing)
    with pytest.raises(StoreError, match=r"1 of 2 blocks .*block 2 of .*Input/output"):
        build_store(load_spec(spec), filling=FillOptions(retries=1))
    assert failures == {1: -1, 2: 7}
    failures[2] = 0
    assert build_store(load_spec(spec))
    assert shards(whole.path) == files


def test_no_error_of_a_block_is_its_own_cause(
    tmp_path: Path, teacher_file: Path
) -> None:
    """Dask follows causes to their end, and would take all memory on the way."""
    spec = load_spec(_spec(tmp_path, collision_frames(12), teacher_file))
    path = plan_store(spec)
    fill = BlockWorker(BuildInputs.open(spec), StoreWriter(path), None)
    with (
        StoreWriter(path).claim_block("train", 0),
        pytest.raises(BusyError) as caught,
    ):
        fill(Block("train", 0))
    seen: list[BaseException] = []
    error: BaseException | None = caught.value
    while error is not None and len(seen) < 10:
        seen.append(error)
        error = error.__cause__
    assert len(seen) == len(set(map(id, seen))) < 10


def test_passes_that_do_not_fit_are_halved(
    tmp_path: Path,
    teacher_file: Path,
    collisions: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A device with room for 50 atoms, none of which is real but its error."""
    spec = load_spec(_spec(tmp_path, collision_frames(12), teacher_file))
    source = BuildInputs.open(spec)
    teacher = source.teacher
    assert teacher is not None
    samples = [source.datasets["train"][i] for i in range(12)]
    fields = tuple(spec.features)
    wanted = teacher.predict(samples, fields)
    run = TeacherRunner._predict_group
    passes: list[int] = []
    room = 50

    def limited(self: TeacherRunner, group: Any, names: Any) -> Any:
        passes.append(sum(len(graph.structure) for graph in group))
        if passes[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return run(self, group, names)

    monkeypatch.setattr(TeacherRunner, "_predict_group", limited)
    progress = BuildStatus()
    assert build_store(spec, progress=progress)
    assert progress.to_dict()["smaller_passes"] == progress.smaller_passes > 0
    passes.clear()
    found = teacher.predict(samples, fields)
    assert found.keys() == wanted.keys()
    for name, values in found.items():
        assert np.allclose(values, wanted[name], atol=2e-5, rtol=1e-5), name
    total = sum(len(sample.structure) for sample in samples)
    assert sum(n for n in passes if n <= room) == total
    assert max(n for n in passes if n <= room) > max(len(s.structure) for s in samples)
    room = min(len(sample.structure) for sample in samples) - 1
    words = f"Sample {samples[0].sample_id!r} of .* does not fit into the memory of cpu"
    with pytest.raises(DataError, match=words):
        teacher.predict(samples, fields)


def test_halves_keep_order_and_pass_on_other_errors() -> None:
    def run(items: Sequence[int]) -> list[int]:
        if len(items) > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
        if 99 in items:
            raise ValueError("not about memory")
        return list(items)

    parts = list(run_halving_on_oom(run, range(11)))
    assert [item for part in parts for item in part] == list(range(11))
    assert max(map(len, parts)) == 3
    with pytest.raises(ValueError, match="not about memory"):
        list(run_halving_on_oom(run, [1, 99]))


def test_errors_of_devices_are_told_apart() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(MemoryError())
    broken = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert is_device_failure(broken)
    assert not is_out_of_memory(broken)
    shape = RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)")
    assert not is_device_failure(shape)
    assert not is_out_of_memory(shape)
