"""Fields and splits that a spec gains later: the same store as one built at once."""

import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from filelock import FileLock

from pipeline.build import extend
from pipeline.build.inputs import BuildInputs
from pipeline.cli.main import main
from pipeline.store.reader import FeatureStore
from pipeline.store.verify import verify_store
from pipeline.teachers.runner import TeacherRunner
from tests.commands import refusal, run_command
from tests.pipeline.test_profiles import files_of
from tests.stores import save_gemnet, save_teacher, spec_document, write_spec

FEW = {"node_features": {"profile": "q8"}, "per_atom_energy": {}}
MORE = {
    "node_features": {"profile": "q8"},
    "vector_features": {"profile": "compact"},
    "per_atom_energy": {},
}


@pytest.fixture
def document(
    tmp_path: Path, collisions: Callable[..., Path], teacher_file: Path
) -> dict[str, Any]:
    """A spec of several blocks whose second split has no features."""
    splits = {
        "train": collisions(130),
        "test": {
            "format": "extxyz",
            "path": str(collisions(5, 200)),
            "features": False,
        },
    }
    return spec_document(splits, tmp_path / "s.zarr", teacher_file, FEW)


def spec_of(tmp_path: Path, document: dict[str, Any]) -> Path:
    return write_spec(tmp_path / "spec.yaml", document)


def kd_cache(command: str, spec: Path, *more: object) -> str:
    done = run_command(main, [command, spec, "--device", "cpu", *more])
    assert done.exit_code == 0, done.output
    return done.stdout


def extended(
    document: dict[str, Any], collisions: Callable[..., Path]
) -> dict[str, Any]:
    """The spec with another field and another split."""
    new = {"format": "extxyz", "path": str(collisions(40, 130))}
    splits = {**document["splits"], "more": new}
    return document | {"features": MORE, "splits": splits}


def test_an_extended_store_is_one_built_at_once(
    tmp_path: Path, document: dict[str, Any], collisions: Callable[..., Path]
) -> None:
    store = tmp_path / "s.zarr"
    kd_cache("build", spec_of(tmp_path, document))
    before = files_of(store)
    inode = (store / "train/features/node_features/c/1/0").stat().st_ino
    spec = spec_of(tmp_path, extended(document, collisions))
    said = kd_cache("add-field", spec)
    assert "added train/features/vector_features, split more; complete" in said
    after = files_of(store)
    # Only new shards were written: the old ones are the same files on the disk.
    assert (store / "train/features/node_features/c/1/0").stat().st_ino == inode
    kept = [n for n in before if n.startswith(("train/features", "test/structures"))]
    assert kept
    assert all(after[name] == before[name] for name in kept)
    assert verify_store(store) == []
    names = ["s.zarr", "s.zarr.log", "s.zarr.scan-cache", "s.zarr.status.json"]
    assert sorted(f.name for f in tmp_path.iterdir() if "s.zarr" in f.name) == names
    shutil.rmtree(store)
    kd_cache("build", spec)
    assert files_of(store) == after
    assert "added nothing" in kd_cache("add-field", spec)
    assert files_of(store) == after


def test_only_new_fields_are_computed(
    tmp_path: Path,
    document: dict[str, Any],
    collisions: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kd_cache("build", spec_of(tmp_path, document))
    asked: list[tuple[str, ...]] = []
    predict = BuildInputs._arrays

    def watching(source: BuildInputs, index: Any, positions: range, fields: Any) -> Any:
        asked.append((index.name, *fields))
        return predict(source, index, positions, fields)

    monkeypatch.setattr(BuildInputs, "_arrays", watching)
    kd_cache("add-field", spec_of(tmp_path, extended(document, collisions)))
    assert set(asked) == {
        ("train", "vector_features"),
        ("more", "node_features", "per_atom_energy", "vector_features"),
    }


def test_workers_extend_to_the_same_bytes(
    tmp_path: Path, document: dict[str, Any], collisions: Callable[..., Path]
) -> None:
    spec = spec_of(tmp_path, extended(document, collisions))
    kd_cache("build", spec)
    whole = files_of(tmp_path / "s.zarr")
    shutil.rmtree(tmp_path / "s.zarr")
    kd_cache("build", spec_of(tmp_path, document))
    spec = spec_of(tmp_path, extended(document, collisions))
    kd_cache("add-field", spec, "--workers", 1, "--threads", 1)
    assert files_of(tmp_path / "s.zarr") == whole


def test_edges_can_be_added(tmp_path: Path, collisions: Callable[..., Path]) -> None:
    teacher = save_gemnet(tmp_path / "g.safetensors")
    document = spec_document(
        {"train": collisions(12)}, tmp_path / "s.zarr", teacher, {"node_features": {}}
    )
    document["teacher"]["model"] = "gemnet_oc"
    kd_cache("build", spec_of(tmp_path, document))
    document["features"] = {"node_features": {}, "edge_features": {}}
    spec = spec_of(tmp_path, document)
    said = kd_cache("add-field", spec)
    assert "train/edges/edge_features, train/edges/edge_index" in said
    added = files_of(tmp_path / "s.zarr")
    shutil.rmtree(tmp_path / "s.zarr")
    kd_cache("build", spec)
    assert files_of(tmp_path / "s.zarr") == added


def test_readers_go_on_while_a_store_is_extended(
    tmp_path: Path, document: dict[str, Any], collisions: Callable[..., Path]
) -> None:
    kd_cache("build", spec_of(tmp_path, document))
    opened = FeatureStore.open(tmp_path / "s.zarr").splits["train"]
    path = "features/node_features"
    everyone = np.arange(len(opened))
    first = opened.read([0], [path])[path]
    kd_cache("add-field", spec_of(tmp_path, extended(document, collisions)))
    # Opened before, most of its shards mapped only now.
    rows = opened.read(everyone, [path])[path]
    np.testing.assert_array_equal(rows[: len(first)], first)
    fresh = FeatureStore.open(tmp_path / "s.zarr").splits["train"]
    np.testing.assert_array_equal(fresh.read(everyone, [path])[path], rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": {"vector_features": {}}}, "node_features is .* and None in the"),
        (
            {"features": {**MORE, "node_features": {}}},
            "features/node_features is .*q8.* in the store and .*float16",
        ),
        ({"teacher": "other"}, "teacher: checkpoint_sha256 is "),
        ({"seed": 5}, "store.order_seed is 0 in the store and 5 in the spec"),
        ({"limit": 100}, "splits.train: content is "),
        ({"drop": "test"}, "has a split 'test' that the spec lacks"),
    ],
)
def test_changes_of_what_is_there_are_refused(
    tmp_path: Path, document: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    kd_cache("build", spec_of(tmp_path, document))
    before = files_of(tmp_path / "s.zarr")
    document["features"] = change.get("features", MORE)
    if "teacher" in change:
        other = save_teacher(tmp_path / "t.safetensors", seed=4)
        document["teacher"]["checkpoint"] = str(other)
    if "seed" in change:
        document["store"]["seed"] = change["seed"]
    if "limit" in change:
        document["splits"]["train"]["limit"] = change["limit"]
    if "drop" in change:
        del document["splits"][change["drop"]]
    spec = spec_of(tmp_path, document)
    said = refusal(main, ["add-field", spec, "--device", "cpu"])
    assert re.search(words, said), said
    assert files_of(tmp_path / "s.zarr") == before


def test_nothing_to_extend(tmp_path: Path, document: dict[str, Any]) -> None:
    spec = spec_of(tmp_path, document)
    said = refusal(main, ["add-field", spec, "--device", "cpu"])
    assert "is not a feature store" in said
    assert not list(tmp_path.glob(".s.zarr*"))
    kd_cache("build", spec, "--blocks", "0:1")
    said = refusal(main, ["add-field", spec, "--device", "cpu"])
    assert "lacks block" in said


def test_two_extensions_at_once(
    tmp_path: Path, document: dict[str, Any], collisions: Callable[..., Path]
) -> None:
    kd_cache("build", spec_of(tmp_path, document))
    spec = spec_of(tmp_path, extended(document, collisions))
    with FileLock(tmp_path / ".s.zarr.extending.lock"):
        said = refusal(main, ["add-field", spec, "--device", "cpu"])
    assert "is being extended by another process" in said


@pytest.mark.parametrize("renames", [1, 2])
def test_a_kill_between_the_renames_of_old_systems(
    tmp_path: Path,
    document: dict[str, Any],
    collisions: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    renames: int,
) -> None:
    """Without an atomic exchange the next run puts things right."""
    kd_cache("build", spec_of(tmp_path, document))
    spec = spec_of(tmp_path, extended(document, collisions))
    rename, done = Path.rename, []

    def dying(source: Path, target: Path) -> Path:
        if source.suffix == ".zarr" or source.suffix == ".extended":
            if len(done) == renames:
                raise KeyboardInterrupt
            done.append(source)
        return rename(source, target)

    monkeypatch.setattr(extend.ctypes, "CDLL", lambda *a, **k: object())
    monkeypatch.setattr(Path, "rename", dying)
    run_command(main, ["add-field", spec, "--device", "cpu"])
    monkeypatch.setattr(Path, "rename", rename)
    assert len(done) == renames
    kd_cache("add-field", spec)
    found = files_of(tmp_path / "s.zarr")
    assert not list(tmp_path.glob(".s.zarr*"))
    shutil.rmtree(tmp_path / "s.zarr")
    kd_cache("build", spec)
    assert files_of(tmp_path / "s.zarr") == found


def test_an_abandoned_extension_is_thrown_away(
    tmp_path: Path, document: dict[str, Any], collisions: Callable[..., Path]
) -> None:
    kd_cache("build", spec_of(tmp_path, document))
    other = document | {"features": {**FEW, "vector_features": {}}}
    shutil.copytree(tmp_path / "s.zarr", tmp_path / ".s.zarr.extended")
    kd_cache("add-field", spec_of(tmp_path, other))
    split = FeatureStore.open(tmp_path / "s.zarr").splits["train"]
    assert split.arrays["features/vector_features"].dtype == np.float16
    assert not (tmp_path / ".s.zarr.extended").exists()


def test_the_teacher_works_while_a_block_is_written(
    tmp_path: Path, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks at a time, as on a GPU: a write waits for the next prediction."""
    from pipeline.build import fill as filling
    from pipeline.store.writer import StoreWriter

    second = threading.Event()
    calls: list[int] = []
    predict, write = TeacherRunner.predict, StoreWriter.write_block

    def predicting(teacher: TeacherRunner, samples: Any, fields: Any) -> Any:
        if fields:  # the first look asks for energies only
            calls.append(len(samples))
            if len(calls) > 2:  # one of them calibrates
                second.set()
        return predict(teacher, samples, fields)

    waited: list[bool] = []

    def writing(*arguments: Any) -> None:
        if not waited:
            waited.append(second.wait(1800))
        write(*arguments)

    monkeypatch.setattr(TeacherRunner, "predict", predicting)
    monkeypatch.setattr(StoreWriter, "write_block", writing)
    monkeypatch.setattr(filling, "_blocks_at_once", lambda chosen: 2)
    del document["splits"]["test"]
    kd_cache("build", spec_of(tmp_path, document))
    assert waited == [True]


def test_asking_the_teacher_again(
    tmp_path: Path, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    document["features"] = MORE
    kd_cache("build", spec_of(tmp_path, document))
    store = tmp_path / "s.zarr"
    verify = ["verify", store, "--teacher", "--device", "cpu", "--samples", 3]
    done = run_command(main, verify)
    assert done.exit_code == 0
    assert f"{store}: {3 * 5 + 3 * 2} fields of samples are what" in done.stdout
    moved = tmp_path / "moved.safetensors"
    Path(document["teacher"]["checkpoint"])
    said = refusal(main, [*verify, "--set", f"teacher.checkpoint={moved}"])
    assert "does not exist; set its path with --set" in said
    other = save_teacher(moved, seed=4)
    said = refusal(main, [*verify, "--set", f"teacher.checkpoint={other}"])
    assert "The teacher's checkpoint_sha256 is" in said
    # Weights that say they are the old ones, and are not.
    load = TeacherRunner.load

    def changed(*arguments: Any, **more: Any) -> TeacherRunner:
        teacher = load(*arguments, **more)
        first = next(iter(teacher.potential.loaded.model.parameters()))
        first.data.mul_(1.5)
        return teacher

    monkeypatch.setattr(TeacherRunner, "load", changed)
    done = run_command(main, verify)
    assert done.exit_code == 1
    assert "node_features differs from the teacher's result" in done.stderr
    assert "Sample '" in done.stderr


def test_labels_have_no_teacher_to_ask(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    del document["teacher"], document["features"]
    kd_cache("build", spec_of(tmp_path, document))
    said = refusal(main, ["verify", tmp_path / "s.zarr", "--teacher"])
    assert "was made without a teacher" in said
    assert yaml.safe_load((tmp_path / "spec.yaml").read_text())["splits"]
