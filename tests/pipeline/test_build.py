"""Building: the same bytes on every road, and what is stored is what was computed."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.build.build import build_store
from pipeline.build.worker import FillOptions
from pipeline.datasets import open_dataset
from pipeline.errors import CheckpointError, DataError, SpecError, StoreError
from pipeline.spec.cache_spec import CacheSpec, load_spec
from pipeline.store.reader import FeatureStore
from pipeline.store.verify import verify_store
from pipeline.structure import Structure
from pipeline.teachers.runner import TeacherRunner
from tests.frames import collision_frames, frame, write_frames
from tests.labels import label_statistics
from tests.stores import build, save_teacher, spec_document, write_spec


def _bytes(store: Path) -> dict[str, str]:
    """Digest of every file of a store, by its place."""
    return {
        str(file.relative_to(store)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(store.rglob("*"))
        if file.is_file()
    }


def _shards(store: Path) -> dict[str, str]:
    """As ``_bytes``, without the root's record of paths and the digest over it."""
    skipped = ("zarr.json", "digests/c/0")
    return {k: v for k, v in _bytes(store).items() if k not in skipped}


def _spec_at(small_spec: Path, store: Path, *overrides: str) -> CacheSpec:
    return load_spec(small_spec, [f"store.path={store}", *overrides])


@pytest.fixture(scope="module")
def reference(small_store: FeatureStore) -> dict[str, str]:
    """Files of the store that one process built in one go."""
    return _shards(small_store.path)


def test_dask_workers_write_the_same_bytes(
    small_spec: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    store = tmp_path / "s.zarr"
    told: list[tuple[str, int, int]] = []
    sealed = build_store(
        _spec_at(small_spec, store),
        filling=FillOptions(workers=1, threads=1),
        report=lambda split, samples, left: told.append((split, samples, left)),
    )
    assert sealed
    assert _shards(store) == reference
    assert sum(samples for _, samples, _ in told) == 160 + 24
    assert [left for _, _, left in told] == list(range(len(told) - 1, -1, -1))


@pytest.fixture(scope="module")
def many_blocks(
    tmp_path_factory: pytest.TempPathFactory, teacher_file: Path
) -> tuple[Path, dict[str, str]]:
    """Spec with six blocks of two large samples each, and its files built in one go."""
    folder = tmp_path_factory.mktemp("blocks")
    chains = [
        frame(
            f"chain{n}", ["C"] * 400, [[0.1 * (i % 3), 0, 2.5 * i] for i in range(400)]
        )
        for n in range(12)
    ]
    data = write_frames(folder / "d.extxyz", chains)
    features = {"node_features": None}
    document = spec_document({"train": data}, folder / "s.zarr", teacher_file, features)
    spec = write_spec(folder / "s.yaml", document)
    return spec, _shards(build(spec).path)


def test_ranges_of_blocks_then_the_rest_write_the_same_bytes(
    many_blocks: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    store = tmp_path / "s.zarr"
    spec = _spec_at(many_blocks[0], store)
    assert not build_store(spec, filling=FillOptions(blocks=(1, 3)))
    with pytest.raises(StoreError, match="blocks 0, 3, 4, 5 of split 'train'"):
        FeatureStore.open(store)
    assert not build_store(spec, filling=FillOptions(blocks=(9, 99)))
    assert not build_store(spec, filling=FillOptions(blocks=(2, 99)))
    assert build_store(spec)
    assert _shards(store) == many_blocks[1]


def test_a_finished_build_is_left_alone(
    small_spec: Path, small_store: FeatureStore
) -> None:
    before = _bytes(small_store.path)
    times = {f: (small_store.path / f).stat().st_mtime_ns for f in before}
    calls: list[Any] = []
    assert build_store(load_spec(small_spec), report=lambda *told: calls.append(told))
    assert _bytes(small_store.path) == before
    assert times == {f: (small_store.path / f).stat().st_mtime_ns for f in before}
    assert not calls


def test_lost_parts_of_an_unsealed_store_are_built_again(
    many_blocks: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """A deleted, a changed and a torn shard, and a block without its record."""
    store = tmp_path / "s.zarr"
    spec = _spec_at(many_blocks[0], store)
    assert not build_store(spec, filling=FillOptions(blocks=(0, 5)))
    shards = store / "train" / "features" / "node_features" / "c"
    (shards / "0" / "0").unlink()
    content = bytearray((shards / "1" / "0").read_bytes())
    content[100] ^= 1
    (shards / "1" / "0").write_bytes(content)
    torn = shards / "2" / "0"
    torn.write_bytes(torn.read_bytes()[:-7])
    (store / "train" / "index" / "commit" / "c" / "3" / "0" / "0").unlink()
    told: list[tuple[str, int, int]] = []
    assert build_store(spec, report=lambda *report: told.append(report))
    # Blocks 0 to 3 and 5, but not 4.
    assert [samples for _, samples, _ in told] == [2] * 5
    assert _shards(store) == many_blocks[1]


def test_killed_builds_go_on_where_they_stopped(
    many_blocks: tuple[Path, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = tmp_path / "s.zarr"
    spec = _spec_at(many_blocks[0], store)
    predict = TeacherRunner.predict
    seen: list[int] = []

    def failing(self: TeacherRunner, samples: Any, fields: Any) -> Any:
        if fields:  # the first look asks for energies only
            seen.append(len(samples))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return predict(self, samples, fields)

    monkeypatch.setattr(TeacherRunner, "predict", failing)
    with pytest.raises(KeyboardInterrupt):
        build_store(spec)
    assert build_store(spec)
    # Two blocks before the interrupt, the interrupted one, and four after it.
    assert len(seen) == 2 + 1 + 4
    assert _shards(store) == many_blocks[1]


def test_stored_numbers_equal_the_teacher_run_on_single_samples(
    small_store: FeatureStore, small_spec: Path
) -> None:
    spec = load_spec(small_spec)
    assert spec.teacher is not None
    teacher = TeacherRunner.load(spec.teacher)
    fields = tuple(spec.features)
    paths = {
        "teacher_energy": "teacher/energy",
        "teacher_forces": "teacher/forces",
        "per_atom_energy": "teacher/per_atom_energy",
        "node_features": "features/node_features",
        "vector_features": "features/vector_features",
    }
    dataset = open_dataset("extxyz", spec.splits["val"].path)
    split = small_store.splits["val"]
    for number in range(len(dataset)):
        sample = dataset[number]
        position = split.position(sample.sample_id)
        stored = split.read([position], tuple(paths.values()))
        alone = teacher.predict([sample], fields)
        for name, path in paths.items():
            assert stored[path].shape == alone[name].shape, name
            assert np.allclose(stored[path], alone[name], atol=2e-5, rtol=1e-6), name


def test_structures_and_labels_are_stored_unchanged(
    small_store: FeatureStore, datasets: dict[str, Path]
) -> None:
    for name, split in small_store.splits.items():
        dataset = open_dataset("extxyz", str(datasets[name]))
        assert sorted(map(str, split.sample_ids)) == sorted(dataset.sample_ids)
        for number in range(0, len(dataset), 7):
            sample = dataset[number]
            position = split.position(sample.sample_id)
            paths = ("structures/positions", "labels/energy", "labels/forces")
            stored = split.read([position], paths)
            structure = sample.structure
            assert np.array_equal(stored[paths[0]], structure.positions)
            assert stored[paths[1]].tolist() == [sample.energy]
            assert np.array_equal(stored[paths[2]], sample.forces)
            assert split.n_atoms[position] == len(structure)


def test_storage_order_is_a_shuffle_of_the_source(
    small_store: FeatureStore, datasets: dict[str, Path]
) -> None:
    stored = [str(name) for name in small_store.splits["train"].sample_ids]
    source = list(open_dataset("extxyz", str(datasets["train"])).sample_ids)
    assert stored != source
    assert sum(a == b for a, b in zip(stored, source, strict=True)) < 10


def test_checksums_prove_that_structures_belong_to_their_rows(
    small_store: FeatureStore,
) -> None:
    split = small_store.splits["train"]
    paths = ("structures/atomic_numbers", "structures/positions", "structures/cell")
    for position in range(0, len(split), 11):
        numbers, positions, cells = split.read([position], paths).values()
        n = len(numbers)
        structure = Structure(
            numbers,
            positions,
            cells[0],
            np.zeros(3, bool),
            np.zeros(n, np.int8),
            np.zeros(n, bool),
        )
        assert structure.checksum == int(split.checksums[position])
    assert len(set(split.checksums.tolist())) == len(split)


def test_root_says_what_the_numbers_depend_on(
    small_store: FeatureStore, small_spec: Path, datasets: dict[str, Path]
) -> None:
    attributes = small_store.attributes
    spec = load_spec(small_spec)
    assert spec.teacher is not None
    digest = hashlib.sha256(Path(spec.teacher.checkpoint).read_bytes()).hexdigest()
    assert attributes["teacher"]["checkpoint_sha256"] == digest
    assert attributes["teacher"]["graph_rule"]["cutoff"] == 5.0
    assert attributes["complete"] is True
    assert attributes["order_seed"] == 0
    assert len(small_store.fingerprint) == 64
    statistics = label_statistics(
        open_dataset("extxyz", str(datasets["train"])), "per_element"
    )
    assert attributes["label_statistics"]["train"] == statistics.to_dict()
    assert attributes["provenance"]["software"]["torch"]


def test_labels_store_has_labels_only(labels_store: FeatureStore) -> None:
    assert labels_store.attributes["teacher"] is None
    for split in labels_store.splits.values():
        groups = {path.split("/")[0] for path in split.arrays}
        assert groups == {"structures", "labels"}
    assert verify_store(labels_store.path) == []


def test_splits_without_features_keep_the_teachers_predictions(
    tmp_path: Path, collisions: Callable[..., Path], teacher_file: Path
) -> None:
    data = str(collisions(5))
    splits = {
        "train": {"format": "extxyz", "path": data, "limit": 3},
        "val": {"format": "extxyz", "path": data, "offset": 3, "features": False},
    }
    document = spec_document(splits, tmp_path / "s.zarr", teacher_file)
    store = build(write_spec(tmp_path / "s.yaml", document))
    assert {len(split) for split in store.splits.values()} == {3, 2}
    extra = {"features/node_features", "features/vector_features"}
    extra.add("teacher/per_atom_energy")
    train, val = store.splits["train"].arrays, store.splits["val"].arrays
    assert train.keys() - val.keys() == extra
    assert {"teacher/energy", "teacher/forces"} <= val.keys()


def test_default_precision_rounds_to_half(
    tmp_path: Path, collisions: Callable[..., Path], teacher_file: Path
) -> None:
    data = collisions(3)
    stores = [
        build(
            write_spec(
                tmp_path / f"{name}.yaml",
                spec_document(
                    {"train": data},
                    tmp_path / f"{name}.zarr",
                    teacher_file,
                    {"node_features": part},
                ),
            )
        )
        for name, part in (("half", None), ("full", {"dtype": "float32"}))
    ]
    path = "features/node_features"
    half, full = (s.splits["train"].read(range(3), (path,))[path] for s in stores)
    assert (half.dtype, full.dtype) == (np.float16, np.float32)
    assert np.array_equal(half, full.astype(np.float16))
    assert stores[0].fingerprint != stores[1].fingerprint


def test_a_store_of_another_spec_is_not_touched(
    small_spec: Path, small_store: FeatureStore
) -> None:
    before = _bytes(small_store.path)
    with pytest.raises(StoreError, match="planned for another spec") as error:
        build_store(load_spec(small_spec, ["store.seed=1"]))
    assert small_store.fingerprint[:12] in str(error.value)
    assert _bytes(small_store.path) == before


def test_another_place_for_the_same_spec_is_welcome(
    small_spec: Path, small_store: FeatureStore, tmp_path: Path
) -> None:
    moved = tmp_path / "moved.zarr"
    shutil.copytree(small_store.path, moved)
    assert build_store(_spec_at(small_spec, moved))


def test_nothing_is_written_before_the_inputs_are_checked(
    tmp_path: Path, collisions: Callable[..., Path], teacher_file: Path
) -> None:
    data = collisions(3)
    document = spec_document({"train": data}, tmp_path / "s.zarr", teacher_file)
    document["features"]["edge_features"] = {}
    with pytest.raises(SpecError, match="'edge_features'"):
        build_store(load_spec(write_spec(tmp_path / "s.yaml", document)))
    del document["features"]["edge_features"]
    document["teacher"]["model"] = "schnet"
    with pytest.raises(CheckpointError, match=r"teacher\.model"):
        build_store(load_spec(write_spec(tmp_path / "s.yaml", document)))
    assert not (tmp_path / "s.zarr").exists()


def test_samples_larger_than_a_block_are_named(tmp_path: Path) -> None:
    big = frame("big", ["H"] * 1025, [[0, 0, i] for i in range(1025)])
    data = write_frames(tmp_path / "d.extxyz", [*collision_frames(2), big])
    document = spec_document({"train": data}, tmp_path / "s.zarr")
    with pytest.raises(SpecError, match=r"'big' has 1025 atoms.*rows_per_block = 1024"):
        build_store(load_spec(write_spec(tmp_path / "s.yaml", document)))


def test_a_sample_of_exactly_a_block_fits(tmp_path: Path) -> None:
    big = frame("big", ["H"] * 1024, [[0, 0, i] for i in range(1024)])
    data = write_frames(tmp_path / "d.extxyz", [big, *collision_frames(2)])
    document = spec_document({"train": data}, tmp_path / "s.zarr")
    store = build(write_spec(tmp_path / "s.yaml", document))
    assert store.splits["train"].n_blocks == 2


def test_features_that_overflow_are_named_with_the_way_out(
    tmp_path: Path, collisions: Callable[..., Path]
) -> None:
    """Finite weights whose features are not, and features too large for float16."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    teacher = save_teacher(tmp_path / "t.safetensors")
    with safe_open(teacher, framework="pt") as file:
        metadata = file.metadata()
    sound = load_file(teacher)
    data = collisions(3)
    for factor, dtype, words in (
        (1e38, "float32", "NaN or infinite"),
        (1e6, "float16", "float32"),
    ):
        tensors = {
            name: tensor * factor
            if name.startswith("upd_out_scalar_scale_1")
            else tensor
            for name, tensor in sound.items()
        }
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
        save_file(tensors, teacher, metadata=metadata)
        store = tmp_path / f"{dtype}.zarr"
        features = {"node_features": {"dtype": dtype}}
        document = spec_document({"train": data}, store, teacher, features)
        spec = load_spec(write_spec(tmp_path / "s.yaml", document))
        with pytest.raises(DataError, match=words) as error:
            build_store(spec)
        assert "Sample 't0" in str(error.value)
        assert not FeatureStore.open(store, allow_unsealed=True).attributes["complete"]


def test_spec_is_kept_in_the_provenance(
    small_store: FeatureStore, small_spec: Path
) -> None:
    kept = small_store.attributes["provenance"]["spec"]
    written = yaml.safe_load(small_spec.read_text())
    assert kept["splits"].keys() == written["splits"].keys()
    assert kept["features"].keys() == written["features"].keys()
