"""Plan a store, fill its blocks, seal it; continues whatever an earlier run left."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.calibrating import calibrate_fields
from pipeline.datasets import Dataset, open_dataset
from pipeline.errors import DataError, StoreError
from pipeline.fields import FIELDS
from pipeline.planning import (
    CountEdges,
    plan_split,
    scan_dataset,
    store_attributes,
    wanted_features,
)
from pipeline.preview import preview
from pipeline.spec import CacheSpec
from pipeline.statistics import check_energy_kinds
from pipeline.store.calibration import Calibration
from pipeline.store.index import SplitIndex
from pipeline.store.layout import IntArray, storage_order
from pipeline.store.writer import SplitPlan, StoreWriter, create_store
from pipeline.structure import Sample
from pipeline.teacher import Arrays, Teacher

log = logging.getLogger("pipeline.build")
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Source:
    """All that a process needs to fill blocks of a planned store.

    ``orders`` gives for every split the dataset index at each storage position.
    """

    spec: CacheSpec
    datasets: dict[str, Dataset]
    orders: dict[str, IntArray]
    teacher: Teacher | None

    @classmethod
    def open(cls, spec: CacheSpec, device: str = "cpu") -> "Source":
        """Datasets and teacher of ``spec``; reads no sample.

        Raises
        ------
        SpecError, DataError, CheckpointError
            A file is not what the spec says, or the teacher lacks a field.
        """
        layers = {n: f.layer for n, f in spec.features.items() if f.layer is not None}
        teacher = None
        if spec.teacher is not None:
            teacher = Teacher.load(spec.teacher, device, layers)
            teacher.check_fields(tuple(spec.features))
        datasets = {
            name: open_dataset(
                s.format,
                s.path,
                offset=s.offset,
                limit=s.limit,
                every=s.every,
                energy=s.energy,
            )
            for name, s in spec.splits.items()
        }
        seed = spec.store.seed
        orders = {n: storage_order(len(d), seed) for n, d in datasets.items()}
        return cls(spec, datasets, orders, teacher)

    def fill_block(self, writer: StoreWriter, split: str, block: int) -> int:
        """Compute and write one block unless it is there; returns its samples.

        Raises
        ------
        DataError
            A structure is not the one that was planned.
        """
        index = writer.splits[split]
        positions = index.block_positions(block)
        with writer.claim_block(split, block) as missing:
            if missing:
                chosen = self.orders[split][positions.start : positions.stop]
                samples = [self.datasets[split][int(i)] for i in chosen]
                _check_unchanged(index, positions, samples)
                writer.write_block(split, block, self._block_arrays(split, samples))
        return len(positions)

    def _block_arrays(self, split: str, samples: Sequence[Sample]) -> Arrays:
        values = _source_arrays(samples)
        if self.teacher is not None:
            values |= self.teacher.predict(samples, self.fields(split))
        return {FIELDS[name].path: array for name, array in values.items()}

    def fields(self, split: str) -> tuple[str, ...]:
        """Fields that the teacher is asked for in ``split``."""
        return tuple(wanted_features(self.spec, self.spec.splits[split]))

    def calibrations(self, split: str) -> dict[str, Calibration]:
        """Encodings for the features of ``split`` that are not stored faithfully."""
        wanted = wanted_features(self.spec, self.spec.splits[split])
        if self.teacher is None:
            return {}
        return calibrate_fields(self.datasets[split], self.teacher, wanted)

    def edge_counter(self, split: str) -> CountEdges | None:
        """Counts the teacher's edges, where this split is to keep them."""
        if self.teacher is None or "edge_features" not in self.fields(split):
            return None
        return self.teacher.count_edges


@dataclass(frozen=True)
class Job:
    """A store to be built: what it is made from, and how it is planned."""

    source: Source
    plans: dict[str, SplitPlan]
    attributes: dict[str, Any]

    @property
    def path(self) -> Path:
        """Where the store lies."""
        return Path(self.source.spec.store.path)


def prepare(spec: CacheSpec, device: str = "cpu") -> Job:
    """Load the teacher, read every dataset once, plan every split; writes nothing.

    Edges are counted only for a store that is not there yet: one that is knows them.

    Raises
    ------
    SpecError, DataError, CheckpointError
        Anything that would make the build fail later and can be known now.
    """
    source = Source.open(spec, device)
    check_energy_kinds(spec.splits, source.datasets)
    new = not Path(spec.store.path).exists()
    scans = {
        name: scan_dataset(
            dataset,
            spec.splits[name].reference_energies,
            source.edge_counter(name) if new else None,
        )
        for name, dataset in source.datasets.items()
    }
    plans = {
        name: plan_split(
            spec,
            name,
            dataset,
            scans[name],
            source.teacher,
            source.calibrations(name) if new else {},
        )
        for name, dataset in source.datasets.items()
    }
    attributes = store_attributes(spec, scans, plans, source.teacher)
    if new and source.teacher is not None:
        attributes["provenance"]["preview"] = {
            name: preview(name, dataset, source.teacher, source.fields(name))
            for name, dataset in source.datasets.items()
        }
    return Job(source, plans, attributes)


def build_store(
    spec: CacheSpec,
    *,
    device: str = "cpu",
    workers: int = 0,
    blocks: tuple[int, int] | None = None,
    report: Report = lambda split, samples, blocks_left: None,
) -> bool:
    """Create or continue the store of ``spec``; True once it is sealed.

    ``blocks`` restricts the work to that half-open range of every split, for array
    jobs. ``workers`` > 0 runs blocks in that many processes of a Dask cluster; the
    bytes written are the same.

    Raises
    ------
    StoreError
        A store of another fingerprint lies at the path, or a block is being built by
        another process.
    """
    job = prepare(spec, device)
    create_or_match(job)
    writer = StoreWriter(job.path)
    if writer.sealed:
        return True
    pending = [
        (split, block)
        for split in job.plans
        for block in writer.pending_blocks(split, verify=True)
        if blocks is None or blocks[0] <= block < blocks[1]
    ]
    log.info("%s: %d blocks to do", job.path, len(pending))
    source = job.source
    done = (
        ((split, source.fill_block(writer, split, block)) for split, block in pending)
        if workers == 0
        else _fill_with_dask(spec, pending, device, workers)
    )
    for number, (split, samples) in enumerate(done, 1):
        report(split, samples, len(pending) - number)
        log.info("%s: block %d of %d written", split, number, len(pending))
    if any(writer.pending_blocks(split) for split in job.plans):
        return False
    writer.seal()
    log.info("%s: sealed", job.path)
    return True


def create_or_match(job: Job) -> None:
    """Plan the store on disk, or accept the one there if its fingerprint agrees."""
    if not job.path.exists():
        create_store(job.path, list(job.plans.values()), job.attributes)
        return
    found = StoreWriter(job.path).attributes["fingerprint"]
    wanted = job.attributes["fingerprint"]
    if found != wanted:
        raise StoreError(
            f"{job.path} was planned for another spec (its fingerprint is "
            f"{found[:12]}…, this spec's {wanted[:12]}…); remove it or set store.path."
        )


def _fill_with_dask(
    spec: CacheSpec, pending: list[tuple[str, int]], device: str, workers: int
) -> Iterator[tuple[str, int]]:
    """Blocks through a local cluster, two in flight per worker; arrays stay there."""
    from distributed import Client, LocalCluster, as_completed

    document = spec.model_dump_json()
    with (
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address="127.0.0.1:0",  # any free port
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        queue = iter(pending)
        flying = as_completed()
        for split, block in _take(queue, 2 * workers):
            flying.add(client.submit(_fill_in_worker, document, device, split, block))
        for future in flying:
            yield future.result()
            for split, block in _take(queue, 1):
                flying.add(
                    client.submit(_fill_in_worker, document, device, split, block)
                )


def _take(queue: Iterator[tuple[str, int]], count: int) -> list[tuple[str, int]]:
    return [item for _, item in zip(range(count), queue, strict=False)]


def _fill_in_worker(
    document: str, device: str, split: str, block: int
) -> tuple[str, int]:
    source, writer = _worker_state(document, device)
    return split, source.fill_block(writer, split, block)


@lru_cache(maxsize=1)
def _worker_state(document: str, device: str) -> tuple[Source, StoreWriter]:
    """Datasets and teacher, loaded once in each worker process."""
    source = Source.open(CacheSpec.model_validate_json(document), device)
    return source, StoreWriter(source.spec.store.path)


def _check_unchanged(
    index: SplitIndex, positions: range, samples: Sequence[Sample]
) -> None:
    """Raise unless ``samples`` are those that the store was planned for."""
    for position, sample in zip(positions, samples, strict=True):
        planned = int(index.checksums[position]), str(index.sample_ids[position])
        if planned != (sample.structure.checksum, sample.sample_id):
            raise DataError(
                f"splits.{index.name}: sample {planned[1]!r} is not what it was when "
                f"{index.place} was planned; restore the dataset or choose another "
                "store.path."
            )


def _source_arrays(samples: Sequence[Sample]) -> Arrays:
    """Structures and labels of ``samples`` by field name, node fields concatenated."""
    structures = [sample.structure for sample in samples]
    return {
        "atomic_numbers": np.concatenate([s.atomic_numbers for s in structures]),
        "positions": np.concatenate([s.positions for s in structures]),
        "fixed": np.concatenate([s.fixed for s in structures]).astype(np.uint8),
        "tags": np.concatenate([s.tags for s in structures]),
        "cell": np.stack([s.cell for s in structures]),
        "pbc": np.stack([s.pbc for s in structures]).astype(np.uint8),
        "energy": np.array([sample.energy for sample in samples]),
        "forces": np.concatenate([sample.forces for sample in samples]),
    }
