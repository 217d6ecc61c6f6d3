"""What a batch holds, and what it refuses."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from kd_train.loader.data import _EDGE_OVERHEAD, CachedSamples, decode_batch
from pipeline.datasets import open_dataset
from pipeline.errors import DataError
from pipeline.graphs.neighbors import NeighborSpec
from pipeline.store.reader import FeatureStore
from tests.frames import frame, write_frames
from tests.stores import build, spec_document, write_spec

RULE = NeighborSpec(5.0, 20, symmetric=True)
ELEMENTS = range(1, 84)


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


def test_edges_are_kept_up_to_the_limit_and_are_the_same(
    small_store: FeatureStore,
) -> None:
    split, positions = small_store.splits["train"], np.arange(6)
    kept = CachedSamples(split, RULE, ELEMENTS)
    none = CachedSamples(split, RULE, ELEMENTS, edge_cache_bytes=0)
    expected = kept.batch(positions).edge_index
    assert torch.equal(none.batch(positions).edge_index, expected)
    assert len(kept._edges) == 6
    assert not none._edges
    room = kept._edges[0].nbytes + _EDGE_OVERHEAD
    one = CachedSamples(split, RULE, ELEMENTS, edge_cache_bytes=room)
    one.batch(positions)
    assert list(one._edges) == [0]


def test_batches_made_by_several_threads_are_those_of_one(
    small_store: FeatureStore,
) -> None:
    """Threads share the memorised edges."""
    split = small_store.splits["train"]
    asked = [np.arange(first, first + 20) for first in (0, 10, 20, 30) * 5]
    shared = CachedSamples(split, RULE, ELEMENTS, ("node_features",))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(shared.batch, asked))
    alone = CachedSamples(split, RULE, ELEMENTS, ("node_features",))
    for positions, batch in zip(asked, found, strict=True):
        for name, value in alone.batch(positions).to_dict().items():
            same = torch.equal if isinstance(value, torch.Tensor) else int.__eq__
            assert same(batch[name], value), name


def test_half_precision_features_travel_as_stored_and_become_float32(
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
    stored = samples.batch(np.arange(6))
    assert stored.node_features.dtype == torch.float16
    batch = decode_batch(stored, tuple(half), samples.tables(torch.device("cpu")))
    assert stored.node_features.dtype == torch.float16
    assert batch.node_features.dtype == torch.float32
    assert batch.vector_features is stored.vector_features
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
