"""Which samples come when, what a batch holds, and what the prefetch thread does."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_train.data import (
    CachedSamples,
    ordered_batches,
    prefetch,
    shuffled_batches,
    training_batches,
)
from pipeline.datasets import open_dataset
from pipeline.errors import DataError
from pipeline.graphs.neighbors import GraphRule
from pipeline.store.reader import FeatureStore
from tests.frames import frame, write_frames
from tests.stores import build, spec_document, write_spec

# A thread that is never ended would hold its test for long.
pytestmark = pytest.mark.timeout(60)

RULE = GraphRule(5.0, 20, symmetric=True)
ELEMENTS = range(1, 84)


def _blocks(sizes: list[int]) -> list[range]:
    ends = np.cumsum(sizes).tolist()
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@given(SIZES, st.integers(1, 50), st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_an_epoch_visits_everything_once(
    sizes: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    batches = shuffled_batches(_blocks(sizes), batch_size, seed=seed, epoch=epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(sum(sizes)))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size


def _order(**options: int) -> list[int]:
    batches = shuffled_batches(_blocks([20] * 40), 16, **options)
    return np.concatenate(batches).tolist()


def test_order_follows_from_seed_and_epoch() -> None:
    first = _order(seed=3, epoch=5)
    assert first == _order(seed=3, epoch=5)
    assert first != _order(seed=3, epoch=6)
    assert first != _order(seed=4, epoch=5)
    assert _order(seed=0, epoch=1) != _order(seed=1, epoch=0)
    assert first != sorted(first)


def test_samples_of_a_block_are_spread_over_the_window() -> None:
    """Neither blocks nor samples keep their neighbours of the store."""
    order = np.array(_order(seed=1, epoch=0, buffer_blocks=10))
    windows = [set((order[i : i + 200] // 20).tolist()) for i in range(0, 800, 200)]
    assert all(len(window) == 10 for window in windows)
    assert windows[0] != set(range(10))
    follows = float((np.diff(order) == 1).mean())
    assert follows < 0.05


@given(SIZES, st.integers(1, 40), st.integers(0, 5), st.data())
@settings(max_examples=60, deadline=None)
def test_a_resumed_order_is_the_tail_of_the_whole(
    sizes: list[int], batch_size: int, seed: int, data: st.DataObject
) -> None:
    blocks = _blocks(sizes)
    steps = data.draw(st.integers(1, 60))
    first = data.draw(st.integers(0, steps))
    whole = list(
        training_batches(blocks, batch_size, seed=seed, first_step=0, steps=steps)
    )
    tail = list(
        training_batches(blocks, batch_size, seed=seed, first_step=first, steps=steps)
    )
    assert len(whole) == steps
    assert len(tail) == steps - first
    for left, right in zip(whole[first:], tail, strict=True):
        assert np.array_equal(left, right)


def test_epochs_follow_each_other_without_repeats() -> None:
    blocks = _blocks([7, 5, 9])
    batches = list(training_batches(blocks, 4, seed=2, first_step=0, steps=18))
    for epoch in range(3):
        visited = np.concatenate(batches[6 * epoch : 6 * epoch + 6])
        assert sorted(visited.tolist()) == list(range(21))
    assert not np.array_equal(batches[0], batches[6])


def test_ordered_batches_keep_the_order() -> None:
    batches = ordered_batches(7, 3)
    assert [batch.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert ordered_batches(0, 3) == []


def _threads() -> int:
    return threading.active_count()


def test_prefetch_yields_in_order_and_ends_its_thread() -> None:
    before = _threads()
    made = list(prefetch(lambda p: int(p[0]), ordered_batches(20, 1), depth=3))
    assert made == list(range(20))
    assert _threads() == before


def test_prefetch_works_ahead_but_not_without_bound() -> None:
    made: list[int] = []

    def make(positions: np.ndarray) -> int:
        made.append(int(positions[0]))
        return made[-1]

    stream = prefetch(make, ordered_batches(50, 1), depth=3)
    assert next(stream) == 0
    deadline = time.monotonic() + 20
    # Three in the queue, one in hand, one being offered.
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert 4 <= len(made) <= 6
    stream.close()


def test_prefetch_hands_errors_of_making_to_the_caller() -> None:
    def make(positions: np.ndarray) -> int:
        if positions[0] == 3:
            raise DataError("sample 3 is bad")
        return int(positions[0])

    before = _threads()
    stream = prefetch(make, ordered_batches(9, 1))
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="sample 3 is bad"):
        next(stream)
    assert _threads() == before


def test_prefetch_hands_errors_of_the_order_to_the_caller() -> None:
    def batches() -> Iterator[np.ndarray]:
        yield np.array([1])
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        list(prefetch(len, batches()))


def test_prefetch_stops_when_the_caller_leaves_early() -> None:
    before = _threads()
    stream = prefetch(len, ordered_batches(1000, 1), depth=2)
    assert next(stream) == 1
    assert _threads() == before + 1
    stream.close()
    assert _threads() == before


def test_batch_holds_what_the_file_says(
    small_store: FeatureStore, datasets: dict[str, Path]
) -> None:
    dataset = open_dataset("extxyz", str(datasets["train"]))
    split = small_store.splits["train"]
    sources = {name: dataset[i] for i, name in enumerate(dataset.sample_ids)}
    samples = CachedSamples(split, RULE, ELEMENTS, ("per_atom_energy",))
    positions = np.array([140, 3, 77, 3])
    batch = samples.batch(positions)
    chosen = [sources[str(split.sample_ids[p])] for p in positions]
    assert len(samples) == len(dataset)
    assert batch.num_graphs == 4
    assert batch.energy.tolist() == [s.energy for s in chosen]
    assert batch.energy.dtype == torch.float64
    expected = np.concatenate([s.forces for s in chosen])
    assert np.array_equal(batch.forces.numpy(), expected)
    numbers = np.concatenate([s.structure.atomic_numbers for s in chosen])
    assert np.array_equal(batch.atomic_numbers.numpy(), numbers)
    places = np.concatenate([s.structure.positions for s in chosen])
    assert np.array_equal(batch.positions.numpy(), places.astype(np.float32))
    assert batch.per_atom_energy.shape == (len(numbers),)
    assert "node_features" not in batch


def test_edges_stay_inside_samples_and_do_not_change_when_kept(
    small_store: FeatureStore,
) -> None:
    samples = CachedSamples(small_store.splits["train"], RULE, ELEMENTS)
    positions = np.array([5, 9, 2])
    first, again = samples.batch(positions), samples.batch(positions)
    source, target = first.edge_index
    assert torch.equal(first.batch[source], first.batch[target])
    assert torch.equal(first.edge_index, again.edge_index)
    alone = samples.batch(np.array([2]))
    offset = int(first.natoms[:2].sum())
    mine = first.edge_index[:, first.batch[source] == 2] - offset
    assert torch.equal(alone.edge_index, mine)


def test_half_precision_features_arrive_as_float32(
    tmp_path: Path, teacher_file: Path, datasets: dict[str, Path]
) -> None:
    half = {"node_features": None, "vector_features": {"dtype": "float32"}}
    small = {"format": "extxyz", "path": str(datasets["val"]), "limit": 6}
    document = spec_document(
        {"train": small}, tmp_path / "half.zarr", teacher_file, half
    )
    store = build(write_spec(tmp_path / "half.yaml", document))
    split = store.splits["train"]
    raw = split.read(np.arange(6), ("features/node_features",))
    assert raw["features/node_features"].dtype == np.float16
    samples = CachedSamples(split, RULE, ELEMENTS, tuple(half))
    batch = samples.batch(np.arange(6))
    assert batch.node_features.dtype == torch.float32
    assert np.array_equal(
        batch.node_features.numpy(), raw["features/node_features"].astype(np.float32)
    )
    full = batch.vector_features.numpy()
    assert not np.array_equal(full, full.astype(np.float16).astype(np.float32))


def _labels_of(tmp_path: Path, text: str) -> CachedSamples:
    data = write_frames(tmp_path / "odd.extxyz", [text])
    document = spec_document({"train": data}, tmp_path / "odd.zarr")
    store = build(write_spec(tmp_path / "odd.yaml", document))
    return CachedSamples(store.splits["train"], RULE, ELEMENTS)


def test_sample_without_neighbours_is_named(tmp_path: Path) -> None:
    samples = _labels_of(
        tmp_path, frame("lonely", ["H", "H"], [[0, 0, 0], [9, 0, 0]], energy=1.0)
    )
    with pytest.raises(DataError, match=r"'lonely' has no neighbours.*5"):
        samples.batch(np.array([0]))


def test_element_the_student_does_not_know_is_named(tmp_path: Path) -> None:
    heavy = frame("heavy", ["H", "U"], [[0, 0, 0], [1, 0, 0]], energy=1.0)
    samples = _labels_of(tmp_path, heavy)
    with pytest.raises(DataError, match=r"'heavy'.*atomic number 92"):
        samples.batch(np.array([0]))


def test_fixed_atoms_tags_and_cell_reach_the_batch(tmp_path: Path) -> None:
    slab = frame(
        "slab",
        ["Cu", "O"],
        [[0, 0, 0], [0, 0, 1.5]],
        energy=1.0,
        columns={"fixed": ("I", [1, 0]), "tags": ("I", [0, 2])},
        header='pbc="T T F" Lattice="3 0 0 0 4 0 0 0 20"',
    )
    batch = _labels_of(tmp_path, slab).batch(np.array([0]))
    assert batch.fixed.tolist() == [True, False]
    assert batch.tags.tolist() == [0, 2]
    assert batch.pbc.tolist() == [[True, True, False]]
    assert torch.equal(batch.cell[0].diagonal(), torch.tensor([3.0, 4.0, 20.0]))
    assert bool((batch.cell_offsets != 0).any())
    assert bool((batch.cell_offsets[:, 2] == 0).all())
    assert bool(batch.forces.isnan().all())
