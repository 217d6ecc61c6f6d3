"""Several splits read as one: rows, blocks, edges, and what cannot be joined."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_train.loader.choose_split import choose_split
from kd_train.loader.concat import ConcatSplit
from kd_train.loader.data import CachedSamples, read_paths
from kd_train.loader.split import Split
from kd_train.trainer.setup import store_normalizer
from pipeline.errors import SpecError, StoreError
from pipeline.graphs.neighbors import NeighborSpec
from pipeline.models.normalizer import Normalizer
from pipeline.store.reader import FeatureStore, SplitReader
from tests.frames import collision_frames, write_frames
from tests.kd_train.runs import make_run
from tests.stores import (
    FLOAT32,
    build,
    save_gemnet,
    spec_document,
    teacher_normalizer,
    train_config,
    write_spec,
)

RULE = NeighborSpec(5.0, 20, symmetric=True)
FIELDS = ("node_features", "edge_features", "per_atom_energy")
PARTS = ("train", "more", "third")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Splits with arrays of all levels, one without features, one that repeats."""
    folder = tmp_path_factory.mktemp("joined")
    counts = {"train": (110, 0), "more": (17, 120), "third": (1, 139), "bare": (6, 150)}
    splits = {
        name: {"format": "extxyz", "path": str(_file(folder, name, *span))}
        for name, span in counts.items()
    }
    splits["bare"] |= {"features": False}
    splits["again"] = {"format": "extxyz", "path": str(_file(folder, "again", 4, 130))}
    teacher = save_gemnet(folder / "teacher.safetensors")
    features = dict.fromkeys(FIELDS, FLOAT32) | {"node_features": None}
    document = spec_document(splits, folder / "s.zarr", teacher, features)
    document["teacher"]["model"] = "gemnet_oc"
    return build(write_spec(folder / "s.yaml", document))


def _file(folder: Path, name: str, count: int, first: int) -> Path:
    return write_frames(folder / f"{name}.extxyz", collision_frames(count, first))


@pytest.fixture(scope="module")
def joined(store: FeatureStore) -> Split:
    return choose_split(store, "+".join(PARTS), FIELDS)


def _located(store: FeatureStore, position: int) -> tuple[SplitReader, int]:
    """Split and position there, by counting through the splits."""
    for name in PARTS:
        if position < len(store.splits[name]):
            return store.splits[name], position
        position -= len(store.splits[name])
    raise AssertionError(position)


def test_one_split_is_not_wrapped(store: FeatureStore) -> None:
    assert choose_split(store, "more", FIELDS) is store.splits["more"]


def test_samples_follow_each_other(store: FeatureStore, joined: Split) -> None:
    assert joined.name == "train+more+third"
    assert len(joined) == 128
    for position in range(128):
        split, own = _located(store, position)
        assert joined.sample_ids[position] == split.sample_ids[own]
        assert joined.n_atoms[position] == split.n_atoms[own]
        assert joined.n_edges[position] == split.n_edges[own]


def test_blocks_are_those_of_the_splits(store: FeatureStore, joined: Split) -> None:
    expected = [
        [str(i) for i in store.splits[name].sample_ids[list(block)]]
        for name in PARTS
        for block in map(
            store.splits[name].block_positions, range(store.splits[name].n_blocks)
        )
    ]
    assert len(expected) == joined.n_blocks >= 4
    for number, ids in enumerate(expected):
        positions = joined.block_positions(number)
        assert [str(i) for i in joined.sample_ids[list(positions)]] == ids
    for outside in (-1, joined.n_blocks):
        with pytest.raises(StoreError, match=f"not {outside}"):
            joined.block_positions(outside)


def _assert_rows(store: FeatureStore, joined: Split, positions: list[int]) -> None:
    paths = list(joined.arrays)
    found = joined.read(positions, paths)
    assert list(found) == paths
    for path in paths:
        parts = []
        for position in positions:
            split, own = _located(store, position)
            parts.append(split.read([own], [path])[path])
        info = joined.arrays[path]
        expected = np.concatenate(parts) if parts else np.empty((0, *info.shape))
        assert found[path].shape == expected.shape
        assert found[path].dtype == info.dtype
        assert np.array_equal(found[path], expected, equal_nan=True), path


@given(st.lists(st.integers(0, 127), max_size=14))
@settings(max_examples=60, deadline=None)
def test_rows_of_any_positions_are_those_of_single_reads(
    store: FeatureStore, joined: Split, positions: list[int]
) -> None:
    _assert_rows(store, joined, positions)


def test_arrays_of_all_levels_are_read(store: FeatureStore, joined: Split) -> None:
    assert {info.level for info in joined.arrays.values()} == {"node", "edge", "sample"}
    assert {*joined.arrays} == {*store.splits["train"].arrays}
    _assert_rows(store, joined, np.random.default_rng(0).permutation(128).tolist())


@pytest.mark.parametrize("position", [-1, 128])
def test_positions_outside_are_refused(position: int, joined: Split) -> None:
    with pytest.raises(StoreError, match=f"Position {position} is outside"):
        joined.read([0, position], ["labels/energy"])


def test_arrays_that_are_not_shared_are_not_seen(store: FeatureStore) -> None:
    labels = choose_split(store, "train+bare")
    assert "features/node_features" not in labels.arrays
    assert "labels/forces" in labels.arrays
    with pytest.raises(StoreError, match=r"'features/node_features'.*share.*labels/"):
        labels.read([0], ["features/node_features"])
    with pytest.raises(StoreError, match="'bare'.*no edges"):
        _ = labels.n_edges


def test_a_split_without_a_wanted_field_is_named(store: FeatureStore) -> None:
    for choice in ("train+bare", "bare+train", "train+more+bare"):
        with pytest.raises(SpecError, match="'bare' lacks 'features/node_features'"):
            choose_split(store, choice, ["node_features"])


def test_a_field_that_all_lack_is_left_to_the_strategy(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    config = train_config(strategy="e2n", train_split="train+val")
    with pytest.raises(SpecError, match="'e2n' needs the field"):
        make_run(small_store, tmp_path, config)


def test_splits_of_another_width_are_both_named(
    store: FeatureStore, small_store: FeatureStore
) -> None:
    parts = [store.splits["train"], small_store.splits["val"]]
    wanted = ["features/node_features"]
    with pytest.raises(SpecError, match=r"'train' and 'val'.*\(12,\).*\(16,\)"):
        ConcatSplit(parts, wanted)
    assert wanted[0] not in ConcatSplit(parts, ["labels/energy"]).arrays


def test_a_sample_in_two_splits_is_named(store: FeatureStore) -> None:
    common = set(store.splits["more"].sample_ids.tolist())
    twice = next(i for i in store.splits["again"].sample_ids.tolist() if i in common)
    with pytest.raises(SpecError, match=f"'{twice}' is in split 'more' and.*'again'"):
        choose_split(store, "train+more+again")


def test_running_numbers_of_two_files_do_not_collide(tmp_path: Path) -> None:
    """B12: files without ids could not be joined although no structure is shared."""
    splits = {}
    for name, first in (("a", 0), ("b", 8), ("c", 0)):
        frames = [
            re.sub(r" sample_id=\S+", "", text) for text in collision_frames(8, first)
        ]
        splits[name] = write_frames(tmp_path / f"{name}.extxyz", frames)
    document = spec_document(splits, tmp_path / "s.zarr")
    store = build(write_spec(tmp_path / "s.yaml", document))
    ids = [set(store.splits[name].sample_ids.tolist()) for name in "ab"]
    assert ids[0] == ids[1]
    joined = choose_split(store, "a+b")
    assert len(joined) == 16
    both = [store.splits[name].checksums for name in "ab"]
    assert np.array_equal(joined.checksums, np.concatenate(both))
    config = train_config(train_split="a+b", val_split="c", steps=2)
    make_run(store, tmp_path / "run", config).train(resume=False)
    with pytest.raises(SpecError, match="is in split 'a' and in split 'c'"):
        choose_split(store, "a+b+c")


@pytest.mark.parametrize("choice", ["train+mroe", "train+", "+train"])
def test_an_unknown_split_is_named(choice: str, store: FeatureStore) -> None:
    with pytest.raises(SpecError, match=r"no split '(mroe)?' .*more, third"):
        choose_split(store, choice)


def test_batches_mix_splits(store: FeatureStore, joined: Split) -> None:
    """Edges and their numbers, too, are those of batches from single splits."""
    fields = ("node_features", "edge_features")
    positions = np.array([115, 2, 127, 111, 3])
    batch = CachedSamples(joined, RULE, range(1, 84), fields).batch(positions)
    shift = 0
    for number, position in enumerate(positions):
        split, own = _located(store, int(position))
        alone = CachedSamples(split, RULE, range(1, 84), fields).batch(np.array([own]))
        mine = batch.batch == number
        assert torch.equal(batch.node_features[mine], alone.node_features)
        assert torch.equal(batch.positions[mine], alone.positions)
        for name in ("edge_index", "teacher_edge_index"):
            edges = batch[name][:, mine[batch[name][0]]]
            assert torch.equal(edges - shift, alone[name])
        edges = mine[batch.teacher_edge_index[0]]
        assert torch.equal(batch.edge_features[edges], alone.edge_features)
        shift += int(mine.sum())


def test_normaliser_of_joined_splits(
    small_store: FeatureStore, labels_store: FeatureStore
) -> None:
    assert store_normalizer(small_store, "train+val") == teacher_normalizer()
    statistics = labels_store.attributes["label_statistics"]
    first = Normalizer.from_dict(statistics["val"])
    assert first != Normalizer.from_dict(statistics["train"])
    assert store_normalizer(labels_store, "val+train") == first


def test_trains_and_validates_on_joined_splits(
    store: FeatureStore, tmp_path: Path
) -> None:
    config = train_config(
        strategy="n2n",
        train_split="train+more",
        val_split="third+bare",
        steps=9,
        eval_every=3,
    )
    run = make_run(store, tmp_path, config)
    summary = run.train(resume=False)
    assert summary["val_split"] == "third+bare"
    assert (run.progress.epoch, run.progress.offset) == (1, 1)
    with np.load(tmp_path / "predictions.npz") as file:
        atoms = [store.splits[name].n_atoms for name in ("third", "bare")]
        assert np.array_equal(file["n_atoms"], np.concatenate(atoms))


def test_paths_of_a_batch_include_the_identity_of_edges() -> None:
    assert "edges/edge_index" in read_paths(["edge_features"]).values()
    assert "edges/edge_index" not in read_paths(["node_features"]).values()
