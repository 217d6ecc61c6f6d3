"""Plan a store, fill its blocks, seal it; continues whatever an earlier run left."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from pipeline.errors import StoreError
from pipeline.files import told_when_full
from pipeline.passes import processes
from pipeline.planning import plan_split, store_attributes
from pipeline.preview import preview
from pipeline.scanning import Scan
from pipeline.scatter import Part
from pipeline.source import Source
from pipeline.spec import CacheSpec
from pipeline.statistics import check_energy_kinds
from pipeline.store.reader import FeatureStore
from pipeline.store.writer import SplitPlan, StoreWriter, create_store

log = logging.getLogger("pipeline.build")
Report = Callable[[str, int, int], None]
# Of a process that fills blocks: one has the teacher, the other the disk.
_THREADS = 2
_starting = threading.Lock()


@dataclass(frozen=True)
class Job:
    """A store to be built: what it is made from, and how it is planned."""

    source: Source
    scans: dict[str, Scan]
    plans: dict[str, SplitPlan]
    attributes: dict[str, Any]


def prepare(
    spec: CacheSpec,
    device: str = "cpu",
    before: FeatureStore | None = None,
    workers: int = 0,
) -> Job:
    """Load the teacher, read every dataset once, plan every split.

    Datasets are read by so many ``workers``, or by this process. Those that a store is
    there for already, and whose files have not changed since, are not read again: what
    was found then is in its sidecar.

    Edges are counted and encodings calibrated only for a store that is not there yet:
    one that is knows them. With ``before``, the store there is planned anew, its own
    encodings kept.

    Raises
    ------
    SpecError, DataError, CheckpointError
        Anything that would make the build fail later and can be known now.
    """
    new = before is not None or not Path(spec.store.path).exists()
    old = {} if before is None else before.splits
    with processes(workers) as run:
        source = Source.open(spec, device, run)
        if new:
            check_energy_kinds(spec.splits, source.datasets)
        scans = {name: source.scan(name, new, run) for name in source.datasets}
    calibrations = {
        name: source.calibrations(name, old[name].index if name in old else None)
        for name in (source.datasets if new else ())
    }
    plans = {
        name: plan_split(
            spec,
            name,
            dataset,
            scans[name],
            source.teacher,
            calibrations.get(name, {}),
        )
        for name, dataset in source.datasets.items()
    }
    attributes = store_attributes(spec, scans, plans, source.teacher)
    if new and source.teacher is not None:
        attributes["provenance"]["preview"] = {
            name: preview(name, dataset, source.teacher, source.fields(name))
            for name, dataset in source.datasets.items()
        }
    return Job(source, scans, plans, attributes)


def plan_store(spec: CacheSpec, device: str = "cpu") -> Path:
    """Plan the store of ``spec``, or accept the one there; fills nothing.

    Raises as `build_store` does.
    """
    job = prepare(spec, device)
    path = Path(spec.store.path)
    with told_when_full(path):
        create_or_match(job, path)
    return path


def build_store(
    spec: CacheSpec,
    *,
    device: str = "cpu",
    workers: int = 0,
    blocks: tuple[int, int] | None = None,
    part: Part | None = None,
    report: Report = lambda split, samples, blocks_left: None,
) -> bool:
    """Create or continue the store of ``spec``; True once it is sealed.

    ``blocks`` restricts the work to that half-open range of every split, ``part`` to
    one of several shares of a planned store, which it leaves unsealed: checking all
    blocks is no work for each of many jobs. ``workers`` > 0 runs blocks in that many
    processes of a Dask cluster; the bytes written are the same.

    Raises
    ------
    StoreError
        A store of another fingerprint lies at the path, or a block is being built by
        another process, or there is no store yet to do a part of.
    """
    path = Path(spec.store.path)
    if part is not None and not path.exists():
        raise StoreError(
            f"{path} is not planned yet; run `kd-cache plan SPEC` once before the parts"
        )
    job = prepare(spec, device, workers=workers)
    with told_when_full(path):
        create_or_match(job, path)
        writer = StoreWriter(path)
        if writer.sealed:
            return True
        filling = Filling(device, workers, blocks, part)
        with nullcontext() if blocks or part else writer.claim_all():
            fill_blocks(job.source, writer, filling, report)
        if part or any(writer.pending_blocks(split) for split in job.plans):
            return False
        writer.seal()
        log.info("%s: sealed", path)
        return True


@dataclass(frozen=True)
class Filling:
    """Who fills blocks, and which: a half-open range of every split, a part, or all.

    Splits that are in the store ``before`` take over what they have there.
    """

    device: str = "cpu"
    workers: int = 0
    blocks: tuple[int, int] | None = None
    part: Part | None = None
    before: Path | None = None

    def chosen(self, n_blocks: dict[str, int]) -> dict[str, range]:
        """Blocks to fill by split, of splits that have ``n_blocks``."""
        if self.part is not None:
            return self.part.blocks(n_blocks)
        first, last = self.blocks or (0, max(n_blocks.values()))
        return {name: range(first, min(last, n)) for name, n in n_blocks.items()}


def fill_blocks(
    source: Source, writer: StoreWriter, filling: Filling, report: Report
) -> None:
    """Fill every pending block, in this process or in workers."""
    n_blocks = {name: index.n_blocks for name, index in writer.splits.items()}
    pending = [
        (split, block)
        for split, among in filling.chosen(n_blocks).items()
        for block in writer.pending_blocks(split, verify=True, among=among)
    ]
    log.info("%s: %d blocks to do", writer.path, len(pending))
    if filling.workers:
        done = _fill_with_dask(source.spec, writer.path, filling, pending)
    else:
        done = _fill_here(_BlockFiller(source, writer, filling.before), pending)
    for number, (split, samples) in enumerate(done, 1):
        report(split, samples, len(pending) - number)
        log.info("%s: block %d of %d written", split, number, len(pending))


class _BlockFiller:
    """Fills blocks of one store; called from several threads at once."""

    def __init__(
        self, source: Source, writer: StoreWriter, before: Path | None
    ) -> None:
        self._source = source
        self._writer = writer
        self._before = {} if before is None else FeatureStore.open(before).splits

    def __call__(self, split: str, block: int) -> tuple[str, int]:
        """Fill ``block``; returns the split and the samples of the block."""
        known = self._before.get(split)
        before = None if known is None else known.index
        return split, self._source.fill_block(self._writer, split, block, before)


def _fill_here(
    fill: _BlockFiller, pending: list[tuple[str, int]]
) -> Iterator[tuple[str, int]]:
    """Two blocks at a time: one is computed while the other is read or written."""
    queue = iter(pending)
    with ThreadPoolExecutor(_THREADS) as threads:
        flying = deque(threads.submit(fill, *item) for item in _take(queue, _THREADS))
        while flying:
            yield flying.popleft().result()
            flying.extend(threads.submit(fill, *item) for item in _take(queue, 1))


def create_or_match(job: Job, path: Path) -> None:
    """Plan the store on disk, or accept the one there if its fingerprint agrees."""
    if not path.exists():
        try:
            create_store(path, list(job.plans.values()), job.attributes)
        except StoreError:
            # Another process that builds the same may have been faster.
            if not path.exists():
                raise
    found = StoreWriter(path).attributes["fingerprint"]
    wanted = job.attributes["fingerprint"]
    if found != wanted:
        raise StoreError(
            f"{path} was planned for another spec (its fingerprint is {found[:12]}…, "
            f"this spec's {wanted[:12]}…); where the spec gained a field or a split, "
            "run `kd-cache add-field SPEC`, else remove the store or set store.path."
        )
    job.source.keep_scans(job.scans)


def _fill_with_dask(
    spec: CacheSpec, path: Path, filling: Filling, pending: list[tuple[str, int]]
) -> Iterator[tuple[str, int]]:
    """Blocks through a local cluster, two in flight per worker; arrays stay there."""
    from distributed import Client, LocalCluster, as_completed

    task = partial(_fill_in_worker, spec.model_dump_json(), path, filling)
    with (
        LocalCluster(
            n_workers=filling.workers,
            threads_per_worker=_THREADS,
            processes=True,
            dashboard_address="127.0.0.1:0",  # any free port
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        queue = iter(pending)
        flying = as_completed()
        for item in _take(queue, _THREADS * filling.workers):
            flying.add(client.submit(task, *item))
        for future in flying:
            yield future.result()
            for item in _take(queue, 1):
                flying.add(client.submit(task, *item))


def _take(queue: Iterator[tuple[str, int]], count: int) -> list[tuple[str, int]]:
    return [item for _, item in zip(range(count), queue, strict=False)]


def _fill_in_worker(
    document: str, path: Path, filling: Filling, split: str, block: int
) -> tuple[str, int]:
    with _starting:
        fill = _worker_filler(document, path, filling)
    return fill(split, block)


@lru_cache(maxsize=1)
def _worker_filler(document: str, path: Path, filling: Filling) -> _BlockFiller:
    """Datasets and teacher, loaded once in each worker process."""
    source = Source.open(CacheSpec.model_validate_json(document), filling.device)
    return _BlockFiller(source, StoreWriter(path), filling.before)
