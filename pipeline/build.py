"""Plan a store, fill its blocks, seal it; continues whatever an earlier run left."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.datasets import Dataset, open_dataset
from pipeline.errors import SpecError, StoreError
from pipeline.fields import FIELDS, LABEL_FIELDS, PREDICTION_FIELDS, STRUCTURE_FIELDS
from pipeline.spec import CacheSpec, FeatureSpec, SplitSpec
from pipeline.statistics import label_statistics
from pipeline.store.layout import BlockPlan, plan_blocks
from pipeline.store.writer import ArrayPlan, SplitPlan, StoreWriter, create_store
from pipeline.structure import Sample
from pipeline.teacher import Arrays, Teacher, width_shape

log = logging.getLogger("pipeline.build")
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """All that a process needs to fill blocks: datasets, plan, teacher."""

    spec: CacheSpec
    datasets: dict[str, Dataset]
    plans: dict[str, SplitPlan]
    attributes: dict[str, Any]
    teacher: Teacher | None

    @property
    def path(self) -> Path:
        """Where the store lies."""
        return Path(self.spec.store.path)

    def fill_block(self, writer: StoreWriter, split: str, block: int) -> int:
        """Compute and write one block unless it is there; returns its samples."""
        plan = self.plans[split].blocks
        first, last = plan.block_bounds[block : block + 2]
        with writer.claim_block(split, block) as missing:
            if missing:
                dataset = self.datasets[split]
                samples = [dataset[int(i)] for i in plan.order[first:last]]
                writer.write_block(split, block, self._block_arrays(split, samples))
        return int(last - first)

    def _block_arrays(self, split: str, samples: Sequence[Sample]) -> Arrays:
        values = _source_arrays(samples)
        if self.teacher is not None:
            wanted = _wanted_features(self.spec, self.spec.splits[split])
            values |= self.teacher.predict(samples, tuple(wanted))
        return {FIELDS[name].path: array for name, array in values.items()}


def prepare(spec: CacheSpec, device: str = "cpu") -> Job:
    """Read the datasets, load the teacher, plan every split; writes nothing.

    Raises
    ------
    SpecError, DataError, CheckpointError
        Anything that would make the build fail later and can be known now.
    """
    teacher = None if spec.teacher is None else Teacher.load(spec.teacher, device)
    if teacher is not None:
        teacher.check_fields(tuple(spec.features))
    datasets = {
        name: open_dataset(
            s.format, s.path, offset=s.offset, limit=s.limit, every=s.every
        )
        for name, s in spec.splits.items()
    }
    plans = {
        name: _plan_split(spec, name, datasets[name], teacher) for name in datasets
    }
    return Job(
        spec, datasets, plans, _attributes(spec, datasets, plans, teacher), teacher
    )


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
    done = (
        ((split, job.fill_block(writer, split, block)) for split, block in pending)
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
    job, writer = _worker_state(document, device)
    return split, job.fill_block(writer, split, block)


@lru_cache(maxsize=1)
def _worker_state(document: str, device: str) -> tuple[Job, StoreWriter]:
    """Datasets and teacher, loaded once in each worker process."""
    job = prepare(CacheSpec.model_validate_json(document), device)
    return job, StoreWriter(job.path)


def _plan_split(
    spec: CacheSpec, name: str, dataset: Dataset, teacher: Teacher | None
) -> SplitPlan:
    largest = int(np.argmax(dataset.n_atoms))
    if dataset.n_atoms[largest] > spec.store.rows_per_block:
        raise SpecError(
            f"splits.{name}: sample {dataset.sample_ids[largest]!r} has "
            f"{dataset.n_atoms[largest]} atoms, more than store.rows_per_block = "
            f"{spec.store.rows_per_block}; raise it."
        )
    blocks = plan_blocks(dataset.n_atoms, spec.store.rows_per_block, spec.store.seed)
    return SplitPlan(
        name=name,
        sample_ids=[dataset.sample_ids[int(i)] for i in blocks.order],
        checksums=_checksums(dataset, blocks),
        blocks=blocks,
        arrays=_array_plans(spec, spec.splits[name], teacher),
    )


def _checksums(dataset: Dataset, blocks: BlockPlan) -> npt.NDArray[np.uint64]:
    return np.array(
        [dataset[int(i)].structure.checksum for i in blocks.order], np.uint64
    )


def _array_plans(
    spec: CacheSpec, split: SplitSpec, teacher: Teacher | None
) -> tuple[ArrayPlan, ...]:
    names: list[str] = [*STRUCTURE_FIELDS, *LABEL_FIELDS]
    dtypes = {name: FIELDS[name].dtype for name in FIELDS}
    widths: dict[str, int] = {}
    if teacher is not None:
        wanted = _wanted_features(spec, split)
        names += [*PREDICTION_FIELDS, *wanted]
        dtypes |= {name: part.dtype for name, part in wanted.items() if part.dtype}
        widths = teacher.widths
    return tuple(
        ArrayPlan(
            path=FIELDS[name].path,
            level="sample" if FIELDS[name].level == "sample" else "node",
            shape=width_shape(name, widths.get(name, 0)),
            dtype=dtypes[name],
            attributes={"unit": FIELDS[name].unit, "meaning": FIELDS[name].meaning},
        )
        for name in names
    )


def _wanted_features(spec: CacheSpec, split: SplitSpec) -> dict[str, FeatureSpec]:
    return dict(spec.features) if split.features else {}


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


def _attributes(
    spec: CacheSpec,
    datasets: dict[str, Dataset],
    plans: dict[str, SplitPlan],
    teacher: Teacher | None,
) -> dict[str, Any]:
    """Provenance of the store and the fingerprint of all that decides its numbers."""
    statistics = {
        name: label_statistics(datasets[name], spec.splits[name].reference_energies)
        for name in datasets
    }
    identity = {
        "teacher": None if teacher is None else teacher.identity,
        "splits": {
            name: {"features": s.features, "content": _content_digest(datasets[name])}
            for name, s in spec.splits.items()
        },
        "arrays": {
            name: [[a.path, list(a.shape), a.dtype] for a in plan.arrays]
            for name, plan in plans.items()
        },
        "rows_per_block": spec.store.rows_per_block,
        "order_seed": spec.store.seed,
        "label_statistics": {n: s.to_dict() for n, s in statistics.items()},
    }
    text = json.dumps(identity, sort_keys=True)
    return {
        **identity,
        "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
        "provenance": {
            "spec": spec.model_dump(),
            "teacher": None if teacher is None else teacher.loaded.provenance,
            "software": {n: version(n) for n in ("kd-train", "torch", "zarr", "vesin")},
        },
    }


def _content_digest(dataset: Dataset) -> str:
    """SHA-256 over ids, structures and labels, in the order of the source."""
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        sample = dataset[index]
        digest.update(sample.sample_id.encode() + b"\0")
        structure = sample.structure
        digest.update(structure.checksum.to_bytes(8, "little"))
        for part in (structure.pbc, structure.tags, structure.fixed):
            digest.update(part.tobytes())
        digest.update(np.float64(sample.energy).tobytes())
        digest.update(np.ascontiguousarray(sample.forces).tobytes())
    return digest.hexdigest()
