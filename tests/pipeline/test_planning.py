"""Planning: one pass over a dataset, and what it finds out on the way."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.build.build import create_or_match, make_build_plan
from pipeline.build.inputs import BuildInputs
from pipeline.build.scan import scan_dataset
from pipeline.datasets import Dataset, open_dataset
from pipeline.datasets import label_statistics as statistics
from pipeline.errors import DataError
from pipeline.graphs.neighbors import NeighborSpec, neighbor_edges
from pipeline.spec.cache_spec import CacheSpec, load_spec
from pipeline.store.writer import StoreWriter
from pipeline.structure import Sample, Structure
from tests.frames import collision_frames, write_frames
from tests.labels import label_statistics
from tests.stores import spec_document, write_spec

RULE = NeighborSpec(4.0, 12, symmetric=True)


class Recorded(Dataset):
    """A dataset that remembers which samples were read."""

    def __init__(self, inner: Dataset) -> None:
        self.path = inner.path
        self.inner = inner
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Sample:
        self.read.append(index)
        return self.inner[index]

    @property
    def sample_ids(self):
        return self.inner.sample_ids

    @property
    def n_atoms(self):
        return self.inner.n_atoms


@pytest.fixture
def dataset(collisions: Callable[..., Path]) -> Dataset:
    return open_dataset("extxyz", str(collisions(30)))


def _count(structure: Structure) -> int:
    return len(neighbor_edges(structure, RULE))


def test_every_sample_is_read_once(dataset: Dataset) -> None:
    recorded = Recorded(dataset)
    hashed: list[int] = []
    found = scan_dataset(
        recorded, "per_element", lambda s: hashed.append(len(s)) or _count(s)
    )
    assert recorded.read == list(range(30))
    assert len(hashed) == 30
    structures = [dataset[i].structure for i in range(30)]
    assert found.structure_hashes.tolist() == [s.checksum for s in structures]
    assert found.n_edges is not None
    assert found.n_edges.tolist() == [_count(s) for s in structures]
    assert len(set(found.n_edges.tolist())) > 3
    assert found.labels == label_statistics(dataset, "per_element")


def test_content_is_all_ids_structures_and_labels_in_order(dataset: Dataset) -> None:
    parts = []
    for index in range(30):
        sample = dataset[index]
        s = sample.structure
        parts += [sample.sample_id.encode(), b"\0", s.checksum.to_bytes(8, "little")]
        parts += [s.pbc.tobytes(), s.tags.tobytes(), s.fixed.tobytes()]
        parts += [np.float64(sample.energy).tobytes(), sample.forces.tobytes()]
    expected = hashlib.sha256(b"".join(parts)).hexdigest()
    found = scan_dataset(dataset, "none")
    assert found.content_sha256 == expected
    assert found.n_edges is None


def test_a_sample_whose_edges_cannot_be_counted_is_named(dataset: Dataset) -> None:
    def refuse(structure: Structure) -> int:
        raise DataError("The structure has no neighbours.")

    words = f"Sample '{dataset.sample_ids[0]}': The structure has no neighbours"
    with pytest.raises(DataError, match=words):
        scan_dataset(dataset, "none", refuse)


@pytest.mark.parametrize("fold", [1, 7, 29, 30, 1000])
def test_folded_equations_have_the_solution_of_all(
    dataset: Dataset, fold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "FOLD", fold)
    samples = [dataset[i] for i in range(30)]
    counts = np.zeros((30, 119))
    for row, sample in zip(counts, samples, strict=True):
        np.add.at(row, sample.structure.atomic_numbers, 1)
    energies = np.array([sample.energy for sample in samples])
    # Absent elements get 0 from the smallest solution too.
    solution = np.linalg.lstsq(counts, energies, rcond=None)[0]
    found = label_statistics(dataset, "per_element")
    assert found.element_references == pytest.approx(solution, rel=1e-7, abs=1e-7)
    mean = float((energies - counts @ solution).mean())
    assert found.energy_mean == pytest.approx(mean, abs=1e-8)
    forces = np.concatenate([s.forces for s in samples]).astype(np.float64)
    assert found.force_std == pytest.approx(np.sqrt((forces**2).mean()), rel=1e-12)


def _labels_spec(folder: Path, data: Path) -> CacheSpec:
    document = spec_document({"train": data}, folder / "s.zarr")
    return load_spec(write_spec(folder / "s.yaml", document))


def test_a_dataset_that_changes_after_planning_is_refused(tmp_path: Path) -> None:
    texts = collision_frames(6)
    data = write_frames(tmp_path / "d.extxyz", texts)
    spec = _labels_spec(tmp_path, data)
    create_or_match(make_build_plan(spec), Path(spec.store.path))
    write_frames(data, [*texts[:4], texts[5], texts[4]])
    planned = make_build_plan(spec).plans["train"].blocks.order
    writer = StoreWriter(spec.store.path)
    moved = next(
        str(writer.splits["train"].sample_ids[p])
        for p in range(6)
        if planned[p] in (4, 5)
    )
    source = BuildInputs.open(spec)
    words = f"splits.train: sample '{moved}' is not what it was when .* was planned"
    with pytest.raises(DataError, match=words):
        source.fill_block(writer, "train", 0)
    assert writer.pending_blocks("train") == [0]
    write_frames(data, texts)
    assert BuildInputs.open(spec).fill_block(writer, "train", 0) == 6
    assert writer.pending_blocks("train") == []


def test_filling_needs_no_pass_over_the_dataset(tmp_path: Path) -> None:
    """A worker reads the samples of its blocks and no others."""
    spec = _labels_spec(
        tmp_path, write_frames(tmp_path / "d.extxyz", collision_frames(120))
    )
    create_or_match(make_build_plan(spec), Path(spec.store.path))
    writer = StoreWriter(spec.store.path)
    assert writer.splits["train"].n_blocks > 1
    source = BuildInputs.open(spec)
    recorded = Recorded(source.datasets["train"])
    source.datasets["train"] = recorded
    positions = writer.splits["train"].block_positions(1)
    assert source.fill_block(writer, "train", 1) == len(positions)
    ids = [str(writer.splits["train"].sample_ids[p]) for p in positions]
    assert [recorded.sample_ids[i] for i in recorded.read] == ids
    assert source.fill_block(writer, "train", 1) == len(positions)
    assert len(recorded.read) == len(positions)
