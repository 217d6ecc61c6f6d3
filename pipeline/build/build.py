"""Plan a store, fill its blocks, seal it; continues whatever an earlier run left."""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.build.contents import check_labels, warn_repeated, warn_shared
from pipeline.build.fill import BlockCallback, count_blocks, fill_blocks
from pipeline.build.filter_samples import find_bad_samples, warn_of_bad_samples
from pipeline.build.generated import count_teacher_passes, make_structures
from pipeline.build.inputs import BuildInputs, planned_paths
from pipeline.build.plan import plan_split, store_attributes, warn_undetermined
from pipeline.build.preflight import preview
from pipeline.build.scan import Scan
from pipeline.build.status import BuildStatus
from pipeline.build.worker import FillOptions
from pipeline.datasets.label_statistics import check_energy_kinds
from pipeline.errors import StoreError
from pipeline.files.atomic import disk_full_as_error, is_free
from pipeline.parallel.device_choice import choose_device
from pipeline.parallel.ordered_map import (
    Count,
    OrderedMap,
    Tally,
    ignore_counts,
    processes,
    useful_workers,
)
from pipeline.spec.cache_spec import CacheSpec
from pipeline.store.reader import FeatureStore
from pipeline.store.writer import SplitPlan, StoreWriter, create_store

log = logging.getLogger("pipeline.build.build")


@dataclass(frozen=True)
class BuildPlan:
    """A store to be built: what it is made from, and how it is planned."""

    source: BuildInputs
    scans: dict[str, Scan]
    plans: dict[str, SplitPlan]
    attributes: dict[str, Any]


def make_build_plan(
    spec: CacheSpec,
    device: str = "cpu",
    before: FeatureStore | None = None,
    workers: int = 0,
    count: Count = ignore_counts,
) -> BuildPlan:
    """Load the teacher, read every dataset once, plan every split.

    Datasets are read by so many ``workers``, or by this process. Those that a store is
    there for already, and whose files have not changed since, are not read again: what
    was found then is in its sidecar. ``count`` is told how many samples each pass over
    them has read.

    Edges are counted and encodings calibrated only for a store that is not there yet:
    one that is knows them. With ``before``, the store there is planned anew, its own
    encodings kept.

    Raises
    ------
    SpecError, DataError, CheckpointError
        Anything that would make the build fail later and can be known now.
    """
    path = Path(spec.store.path)
    new = before is not None or is_free(path)
    old = {} if before is None else before.splits
    with processes(workers) as run:
        source = BuildInputs.open(spec, device, run)
        make_structures(source, before is None, run, count)
        source, bad = _filter_bad_samples(source, run, count)
        if new:
            check_energy_kinds(spec.splits, source.datasets)
        tally = Tally(count, sum(map(len, source.datasets.values())))
        scans = {
            name: source.scan(name, new, run, tally.add) for name in source.datasets
        }
    if new:
        warn_undetermined(spec.splits, scans)
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
            None if new else planned_paths(path, name),
        )
        for name, dataset in source.datasets.items()
    }
    _warn_of_labels(source, scans)
    attributes = store_attributes(spec, scans, plans, source.teacher)
    if bad:
        attributes["provenance"]["bad_samples"] = bad
    if source.teacher is not None:
        attributes["provenance"]["teacher_passes"] = count_teacher_passes(source, plans)
    if new and source.teacher is not None:
        attributes["provenance"]["preview"] = {
            name: preview(name, dataset, source.teacher, source.fields(name))
            for name, dataset in source.datasets.items()
        }
    return BuildPlan(source, scans, plans, attributes)


def _warn_of_labels(source: BuildInputs, scans: Mapping[str, Scan]) -> None:
    """Warn of labels that are not everywhere, and of structures that are twice."""
    for name, split in source.spec.splits.items():
        if split.labelled:
            check_labels(name, split, scans[name].contents)
        ids = source.datasets[name].sample_ids
        warn_repeated(name, scans[name].structure_hashes, ids)
    warn_shared(
        {name: scan.structure_hashes for name, scan in scans.items()},
        {name: dataset.sample_ids for name, dataset in source.datasets.items()},
    )


def plan_store(
    spec: CacheSpec,
    device: str = "cpu",
    workers: int = 0,
    count: Count = ignore_counts,
) -> Path:
    """Plan the store of ``spec``, or accept the one there; fills nothing.

    Datasets are read by so many ``workers``; ``count`` is told how many samples each
    pass has read. Raises as `build_store` does.
    """
    job = make_build_plan(spec, device, workers=workers, count=count)
    path = Path(spec.store.path)
    with disk_full_as_error(path):
        create_or_match(job, path)
    return path


def _filter_bad_samples(
    source: BuildInputs, run: OrderedMap, count: Count
) -> tuple[BuildInputs, dict[str, list[list[str]]]]:
    """``source`` without the samples that its spec lets out; their ids and reasons.

    Splits that are planned already keep to what was found then.
    """
    found = {}
    skipping = [n for n, s in source.spec.splits.items() if s.on_bad_sample != "fail"]
    new = {n: source.datasets[n] for n in skipping if n not in source.planned}
    tally = Tally(count, sum(map(len, new.values()))) if new else None
    for name in skipping:
        if tally is None or name not in new:
            bad = source.planned[name]
            if bad:
                total = len(source.datasets[name]) + len(bad)
                warn_of_bad_samples(name, bad, total)
        else:
            bad = find_bad_samples(new[name], source.demands(name), run, tally.add)
            source = source.drop(name, [sample_id for sample_id, _ in bad])
        if bad:
            found[name] = [list(pair) for pair in bad]
    return source, found


def build_store(
    spec: CacheSpec,
    *,
    filling: FillOptions | None = None,
    report: BlockCallback = lambda split, samples, blocks_left: None,
    count: Count = ignore_counts,
    progress: BuildStatus | None = None,
) -> bool:
    """Create or continue the store of ``spec``; True once it is sealed.

    ``filling`` says which blocks are filled and by whom; the bytes written are the
    same. A part of a planned store leaves it unsealed: checking all blocks is no work
    for each of many jobs. ``report`` is told of every block that is filled, ``count``
    of samples while it plans and of blocks while it seals; ``progress`` is kept up to
    date.

    Raises
    ------
    DataError, StoreError
        A store of another fingerprint lies at the path, blocks could not be written, or
        there is no store yet to do a part of.
    WorkersError
        The workers are gone, or do not see what they need.
    """
    filling = filling or FillOptions()
    progress = progress or BuildStatus()
    count = count_into(progress, count)
    path = Path(spec.store.path)
    if filling.part is not None and is_free(path):
        raise StoreError(
            f"{path} is not planned yet; run `kd-cache plan SPEC` once before you "
            "build parts"
        )
    # Workers of a cluster choose for themselves; they may have what is missing here.
    device = filling.device if filling.scheduler is None else None
    place = str(choose_device(device))
    job = make_build_plan(spec, place, workers=filling.workers, count=count)
    with disk_full_as_error(path):
        create_or_match(job, path)
        writer = StoreWriter(path)
        if writer.sealed:
            count_blocks(progress, writer)
            return True
        partly = filling.blocks is not None or filling.part is not None
        with nullcontext() if partly else writer.claim_all():
            fill_blocks(job.source, writer, filling, report, progress)
        if filling.part or any(writer.pending_blocks(split) for split in job.plans):
            return False
        check_and_seal(writer, filling.workers, progress, count)
        log.info("%s: sealed", path)
        return True


def check_and_seal(
    writer: StoreWriter, workers: int, progress: BuildStatus, count: Count
) -> None:
    """Check all blocks and seal the store, by ``workers`` where it has many blocks."""
    progress.state = "sealing"
    blocks = sum(split.n_blocks for split in writer.splits.values())
    writer.seal(useful_workers(workers, blocks), count)


def count_into(progress: BuildStatus, count: Count) -> Count:
    """``count``, which tells ``progress`` as well."""

    def count_both(done: int, total: int) -> None:
        progress.count(done, total)
        count(done, total)

    return count_both


def create_or_match(job: BuildPlan, path: Path) -> None:
    """Plan the store on disk, or accept the one there if its fingerprint agrees."""
    if is_free(path):
        try:
            create_store(path, list(job.plans.values()), job.attributes)
        except StoreError:
            # Another process that builds the same may have been faster.
            if is_free(path):
                raise
    found = StoreWriter(path).attributes["fingerprint"]
    wanted = job.attributes["fingerprint"]
    if found != wanted:
        raise StoreError(
            f"{path} was planned for another spec (its fingerprint is "
            f"{found[:12]}…, this spec's {wanted[:12]}…); if the spec has a new "
            "field or split, run `kd-cache add-field SPEC`, else remove the store "
            "or set store.path."
        )
    job.source.save_scans(job.scans)
