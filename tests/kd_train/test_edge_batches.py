"""Stored edges in batches: every feature under its source, target and shift."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from kd_train.loader.data import CachedSamples
from pipeline.datasets import Dataset, open_dataset
from pipeline.fields import FIELDS, LABEL_FIELDS, STRUCTURE_FIELDS
from pipeline.graphs.neighbors import Edges, NeighborSpec, sample_edges
from pipeline.store.layout import plan_blocks
from pipeline.store.reader import FeatureStore
from pipeline.store.writer import ArrayPlan, SplitPlan, StoreWriter, create_store
from tests.frames import frame, write_frames

RULE = NeighborSpec(5.0, 12, symmetric=True)
ELEMENTS = range(1, 84)
WIDTH = 4
FIELDS_STORED = (
    *STRUCTURE_FIELDS,
    *LABEL_FIELDS,
    "edge_index",
    "cell_offsets",
    "edge_features",
)
Key = tuple[str, int, int, tuple[int, ...]]


def _feature(sample_id: str, source: int, target: int, shift: list[int]) -> np.ndarray:
    seed = [len(sample_id), ord(sample_id[-1]), source, target, *np.add(shift, 99)]
    return np.random.default_rng(seed).standard_normal(WIDTH).astype(np.float16)


def _edge_arrays(sample_id: str, edges: Edges) -> dict[str, np.ndarray]:
    rows = zip(*edges.edge_index.tolist(), edges.cell_offsets.tolist(), strict=True)
    features = [_feature(sample_id, *row) for row in rows]
    return {
        "edge_index": edges.edge_index.T,
        "cell_offsets": edges.cell_offsets,
        "edge_features": np.array(features),
    }


def _sample_arrays(dataset: Dataset, index: int, rule: NeighborSpec) -> dict:
    sample = dataset[index]
    structure = sample.structure
    edges = sample_edges(sample.sample_id, structure, rule)
    return {
        **{name: getattr(structure, name) for name in STRUCTURE_FIELDS},
        "fixed": structure.fixed.astype(np.uint8),
        "pbc": structure.pbc.astype(np.uint8),
        "energy": np.array(sample.energy),
        "forces": sample.forces,
        **_edge_arrays(sample.sample_id, edges),
    }


def _array_plan(name: str) -> ArrayPlan:
    field = FIELDS[name]
    shape = tuple(WIDTH if size is None else size for size in field.shape)
    return ArrayPlan(field.path, field.level, shape, field.dtype)


def _store(path: Path, dataset: Dataset, rule: NeighborSpec) -> FeatureStore:
    """A store whose edge features follow from the identity of their edges."""
    arrays = [_sample_arrays(dataset, i, rule) for i in range(len(dataset))]
    counts = [len(a["edge_index"]) for a in arrays]
    blocks = plan_blocks(dataset.n_atoms, 40, 1, counts)
    order = blocks.order.tolist()
    plan = SplitPlan(
        "train",
        [dataset.sample_ids[i] for i in order],
        np.zeros(len(order), np.uint64),
        blocks,
        tuple(_array_plan(name) for name in FIELDS_STORED),
    )
    create_store(path, [plan], {"fingerprint": "f"})
    writer = StoreWriter(path)
    for block in range(blocks.n_blocks):
        mine = order[blocks.block_bounds[block] : blocks.block_bounds[block + 1]]
        rows = {}
        for name in FIELDS_STORED:
            join = np.stack if FIELDS[name].level == "sample" else np.concatenate
            rows[FIELDS[name].path] = join([arrays[i][name] for i in mine])
        writer.write_block("train", block, rows)
    writer.seal()
    return FeatureStore.open(path)


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Clusters of different sizes and small crystals, whose edges differ by shift."""
    rng = np.random.default_rng(8)
    texts = []
    for number in range(12):
        atoms = 2 + number % 5
        places = rng.uniform(0, 3, (atoms, 3)).tolist()
        cell = f"{3 + number % 3} 0 0 0.5 4 0 0 0 4.5"
        header = f'pbc="T T F" Lattice="{cell}"' if number % 2 else ""
        more = {"header": header} if header else {}
        texts.append(frame(chr(97 + number), ["C"] * atoms, places, energy=1.0, **more))
    folder = tmp_path_factory.mktemp("frames")
    return open_dataset("extxyz", str(write_frames(folder / "f.extxyz", texts)))


@pytest.fixture(scope="module")
def store(frames: Dataset, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return _store(tmp_path_factory.mktemp("edges") / "s.zarr", frames, RULE)


def _samples(store: FeatureStore, rule: NeighborSpec = RULE) -> CachedSamples:
    return CachedSamples(store.splits["train"], rule, ELEMENTS, ("edge_features",))


def _expected(frames: Dataset, sample_ids: list[str]) -> dict[Key, bytes]:
    expected = {}
    for sample_id in sample_ids:
        sample = frames[list(frames.sample_ids).index(sample_id)]
        edges = sample_edges(sample_id, sample.structure, RULE)
        for source, target, shift in zip(
            *edges.edge_index.tolist(), edges.cell_offsets.tolist(), strict=True
        ):
            value = _feature(sample_id, source, target, shift)
            expected[sample_id, source, target, tuple(shift)] = value.tobytes()
    return expected


def _found(batch: Data, sample_ids: list[str]) -> dict[Key, bytes]:
    first = (torch.cumsum(batch.natoms, 0) - batch.natoms).tolist()
    found: dict[Key, bytes] = {}
    edges = zip(
        *batch.teacher_edge_index.tolist(),
        batch.teacher_cell_offsets.tolist(),
        batch.edge_features.numpy(),
        strict=True,
    )
    for source, target, shift, value in edges:
        place = int(batch.batch[source])
        assert place == int(batch.batch[target])
        atoms = source - first[place], target - first[place]
        key = (sample_ids[place], *atoms, tuple(shift))
        assert key not in found
        found[key] = value.astype(np.float16).tobytes()
    return found


@pytest.mark.parametrize("order", ["all", "some", "one"])
def test_features_arrive_under_their_identity(
    order: str, store: FeatureStore, frames: Dataset
) -> None:
    everyone = np.random.default_rng(2).permutation(len(frames))
    positions = {"all": everyone, "some": everyone[3:8], "one": everyone[:1]}[order]
    batch = _samples(store).batch(positions)
    ids = [str(name) for name in store.splits["train"].sample_ids[positions]]
    expected = _expected(frames, ids)
    assert len({key[3] for key in expected}) > 1
    assert _found(batch, ids) == expected
    assert batch.teacher_edge_index.dtype == torch.int64
    assert batch.edge_features.dtype == torch.float16
    assert batch.edge_mismatch == ""
    # The model's own edges are in the batch as ever, here in the same order.
    assert torch.equal(batch.edge_index, batch.teacher_edge_index)
    assert torch.equal(batch.cell_offsets, batch.teacher_cell_offsets.float())


@pytest.mark.parametrize(
    "rule",
    [
        NeighborSpec(3.5, 12, symmetric=True),
        NeighborSpec(5.0, 3, symmetric=True),
    ],
)
def test_the_first_sample_with_other_edges_is_named(
    rule: NeighborSpec, store: FeatureStore, frames: Dataset
) -> None:
    positions = np.arange(len(frames))
    split = store.splits["train"]
    batch = _samples(store, rule).batch(positions)

    def key_set(index: int, rule: NeighborSpec) -> list:
        edges = sample_edges("x", frames[index].structure, rule)
        return [edges.edge_index.tolist(), edges.cell_offsets.tolist()]

    numbers = [list(frames.sample_ids).index(str(name)) for name in split.sample_ids]
    different = [n for n in numbers if key_set(n, rule) != key_set(n, RULE)]
    assert 0 < len(different) < len(frames)
    assert batch.edge_mismatch == frames.sample_ids[different[0]]
    alike = [p for p, n in enumerate(numbers) if n not in different]
    assert _samples(store, rule).batch(np.array(alike)).edge_mismatch == ""


def test_only_a_strategy_that_asks_reads_edges(store: FeatureStore) -> None:
    samples = CachedSamples(store.splits["train"], RULE, ELEMENTS)
    assert "teacher_edge_index" not in samples.batch(np.arange(3))


def test_equal_ends_with_another_shift_are_another_edge(tmp_path: Path) -> None:
    """One atom in a chain: its edges differ by nothing but their shift."""
    header = 'pbc="F F T" Lattice="9 0 0 0 9 0 0 0 2"'
    texts = [frame("chain", ["C"], [[0, 0, 0]], energy=1.0, header=header)]
    dataset = open_dataset("extxyz", str(write_frames(tmp_path / "c.extxyz", texts)))
    store = _store(tmp_path / "s.zarr", dataset, NeighborSpec(3.0, 9, symmetric=True))
    batch = _samples(store, NeighborSpec(3.0, 9, symmetric=True)).batch(np.array([0]))
    assert batch.teacher_cell_offsets.tolist() == [[0, 0, -1], [0, 0, 1]]
    assert batch.edge_mismatch == ""
    values = [_feature("chain", 0, 0, [0, 0, z]) for z in (-1, 1)]
    assert np.array_equal(batch.edge_features.numpy(), np.float32(values))
