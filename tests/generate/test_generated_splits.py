"""Generated structures as splits of a store: build, kill, resume, extend, refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.build.build import build_store, plan_store
from pipeline.build.extend import extend_store
from pipeline.build.recompute import spot_check
from pipeline.cli.main import main
from pipeline.errors import DataError, SpecError
from pipeline.generate import dataset as generated_dataset
from pipeline.spec.cache_spec import load_spec
from pipeline.store.reader import FeatureStore
from pipeline.store.verify import verify_store
from tests.commands import run_command
from tests.frames import collision_frames, frame, write_frames
from tests.stores import build, save_teacher, spec_document, write_spec

MODES = {"method": "normal_modes", "copies": 4, "temperature": 300}
PATHS = ("structures/positions", "teacher/energy", "teacher/forces")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    return write_frames(folder / "d.extxyz", collision_frames(40))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "t.safetensors")


def _spec(
    folder: Path,
    data: Path,
    teacher: Path,
    generate: Mapping[str, Any] = MODES,
    name: str = "s",
    **keys: Any,
) -> Path:
    """A spec with a labelled split and one of structures generated from it."""
    folder.mkdir(exist_ok=True)
    source = {"format": "extxyz", "path": str(data), "limit": 20}
    modes = {**source, "labels": "none", "generate": dict(generate), **keys}
    document = spec_document(
        {"train": source, "modes": modes}, folder / f"{name}.zarr", teacher
    )
    return write_spec(folder / f"{name}.yaml", document)


def _rows(store: FeatureStore, split: str = "modes") -> dict[str, np.ndarray]:
    part = store.splits[split]
    order = np.argsort(part.sample_ids)
    return part.read(order, PATHS)


def test_a_store_has_labelled_copies_of_every_sample(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    store = build(_spec(tmp_path, data, teacher))
    split, parents = store.splits["modes"], store.splits["train"]
    wanted = {f"{name}#m{k}" for name in parents.sample_ids for k in range(4)}
    assert set(split.sample_ids.tolist()) == wanted
    assert not verify_store(store.path)
    assert spot_check(store.path, 5)[0] == []
    found = split.read(np.arange(len(split)), [*PATHS, "labels/energy"])
    assert np.isfinite(found["teacher/energy"]).all()
    assert np.isnan(found["labels/energy"]).all()
    passes = store.attributes["provenance"]["teacher_passes"]
    atoms = int(parents.n_atoms.sum())
    assert passes["train"] == {"labels": 20, "generation": 0, "force_jacobian": 0}
    assert passes["modes"]["labels"] == 80
    assert passes["modes"]["generation"] >= 20 + 6 * atoms + 80
    told = run_command(main, ["info", store.path]).stdout
    assert "teacher passes" in told


def test_labels_of_the_screen_are_stored_if_no_features_are_asked_for(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    with_features = build(_spec(tmp_path, data, teacher, name="a"))
    bare = build(_spec(tmp_path, data, teacher, name="b", features=False))
    assert bare.attributes["provenance"]["teacher_passes"]["modes"]["labels"] == 0
    first, second = _rows(with_features), _rows(bare)
    assert np.array_equal(first[PATHS[0]], second[PATHS[0]])
    assert first[PATHS[1]] == pytest.approx(second[PATHS[1]], rel=1e-5)
    assert first[PATHS[2]] == pytest.approx(second[PATHS[2]], abs=1e-4)
    assert spot_check(bare.path, 5)[0] == []


def test_workers_make_the_same_bytes(
    tmp_path: Path, data: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = build(_spec(tmp_path, data, teacher, name="a"))
    spec = _spec(tmp_path, data, teacher, name="b")
    run_command(main, ["build", spec, "--workers", "2", "--threads", "1"])
    both = FeatureStore.open(tmp_path / "b.zarr")
    for path, rows in _rows(alone).items():
        assert np.array_equal(rows, _rows(both)[path]), path
    assert both.fingerprint == alone.fingerprint


def test_killed_generation_goes_on_where_it_was(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    """A kill after the first piece: it is kept, and the end is the same."""
    spec = _spec(tmp_path, data, teacher, name="a")
    document = spec.read_text().replace("limit: 20", "limit: 40")
    spec.write_text(document)
    whole = build(spec)
    other = tmp_path / "b.yaml"
    other.write_text(document.replace("a.zarr", "b.zarr"))
    pieces = tmp_path / "b.zarr.generated" / "modes"
    program = "from pipeline.cli.main import main; main()"
    job = subprocess.Popen([sys.executable, "-c", program, "plan", str(other)])
    first = pieces / "000000.npz"
    while not first.exists() and job.poll() is None:
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    kept = first.read_bytes() if first.exists() else None
    assert kept is not None
    before = first.stat().st_mtime_ns
    build_store(load_spec(other))
    assert first.stat().st_mtime_ns == before
    found = FeatureStore.open(tmp_path / "b.zarr")
    assert found.fingerprint == whole.fingerprint
    for path, rows in _rows(whole).items():
        assert np.array_equal(rows, _rows(found)[path]), path


def test_damaged_or_foreign_pieces_are_made_again(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    spec = _spec(tmp_path, data, teacher)
    plan_store(load_spec(spec))
    piece = tmp_path / "s.zarr.generated" / "modes" / "000000.npz"
    sound = piece.read_bytes()
    shutil.rmtree(tmp_path / "s.zarr")
    flipped = bytearray(sound)
    flipped[len(flipped) // 2] ^= 1
    piece.write_bytes(flipped)
    generated_dataset._cached_piece.cache_clear()
    build_store(load_spec(spec))
    arrays = [np.load(file)["positions"] for file in (piece, _saved(tmp_path, sound))]
    assert np.array_equal(*arrays)


def _saved(folder: Path, content: bytes) -> Path:
    path = folder / "saved.npz"
    path.write_bytes(content)
    return path


def test_a_finished_store_needs_no_pieces(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    """Until something is added to the split; then they are made again, and equal."""
    spec = _spec(tmp_path, data, teacher, features=["node_features"])
    build(spec)
    shutil.rmtree(tmp_path / "s.zarr.generated")
    generated_dataset._cached_piece.cache_clear()
    assert build_store(load_spec(spec))
    assert not (tmp_path / "s.zarr.generated").exists()
    spec.write_text(spec.read_text().replace("- node_features", "- per_atom_energy"))
    with pytest.raises(SpecError, match="features is"):
        extend_store(load_spec(spec))


def test_a_split_of_structures_is_added_to_a_store(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    spec = _spec(tmp_path, data, teacher)
    build_store(load_spec(spec, ["splits.modes=null"]))
    assert extend_store(load_spec(spec)) == ["split modes"]
    store = FeatureStore.open(tmp_path / "s.zarr")
    whole = build(_spec(tmp_path, data, teacher, name="whole"))
    assert store.fingerprint == whole.fingerprint
    for path, rows in _rows(whole).items():
        assert np.array_equal(rows, _rows(store)[path]), path


def test_copies_that_are_all_refused_name_sample_and_limits(
    tmp_path: Path, data: Path, teacher: Path
) -> None:
    tight = MODES | {"max_force": 1e-9}
    words = r"'.*#m0' was refused in all 10 draws: .*eV/Å; lower .*max_force"
    with pytest.raises(DataError, match=words):
        build(_spec(tmp_path, data, teacher, tight))
    with pytest.raises(DataError, match=r"none of its 80 samples can be used"):
        build(_spec(tmp_path, data, teacher, tight, name="b", on_bad_sample="skip"))


def test_refused_copies_are_left_out_if_bad_samples_are_skipped(
    tmp_path: Path, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = frame("good", list("OHH"), [[0, 0, 0], [0.96, 0, 0], [-0.3, 0.9, 0]])
    # Closer than min_pair_distance allows, in every draw of so small displacements.
    bad = frame("bad", list("OHH"), [[0, 0, 0], [0.36, 0, 0], [-0.3, 0.9, 0]])
    data = write_frames(tmp_path / "d.extxyz", [good, bad])
    generate = {"method": "rattle", "sigma": 0.001, "copies": 3}
    source = {"format": "extxyz", "path": str(data), "labels": "none"}
    document = spec_document(
        {"copies": {**source, "generate": generate, "on_bad_sample": "skip"}},
        tmp_path / "s.zarr",
        teacher,
    )
    store = build(write_spec(tmp_path / "s.yaml", document))
    ids = sorted(store.splits["copies"].sample_ids.tolist())
    assert ids == ["good#r0", "good#r1", "good#r2"]
    assert "3 of 6 samples are skipped: 'bad#r0'" in caplog.text
    bad_samples = store.attributes["provenance"]["bad_samples"]["copies"]
    assert [name for name, _ in bad_samples] == ["bad#r0", "bad#r1", "bad#r2"]


def test_the_price_is_printed(tmp_path: Path, data: Path, teacher: Path) -> None:
    spec = _spec(tmp_path, data, teacher)
    told = run_command(main, ["plan", spec])
    assert "teacher passes" in told.stdout
    assert "modes" in told.stdout
    found = json.loads(run_command(main, ["plan", spec, "--json"]).stdout)
    assert found["teacher_passes"]["modes"]["generation"] > 100


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": "all"}, r"splits\.modes\.generate: labels .*\.labels: none"),
        ({"rattle": {"copies": 1, "sigma": 0.1}}, r"has rattle and generate"),
        ({"features": ["node_feature"]}, r"'node_feature' is not under.*node_features"),
    ],
)
def test_contradictions_are_refused(
    tmp_path: Path, data: Path, teacher: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        load_spec(_spec(tmp_path, data, teacher, **changes))


def test_a_teacher_is_needed(tmp_path: Path, data: Path, teacher: Path) -> None:
    spec = _spec(tmp_path, data, teacher)
    with pytest.raises(SpecError, match=r"splits\.modes\.generate needs a teacher"):
        load_spec(spec, ["teacher=null", "features={}"])
