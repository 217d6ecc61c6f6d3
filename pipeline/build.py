"""Plan a store, fill its blocks, seal it; continues whatever an earlier run left."""

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.commands import chosen_device
from pipeline.datasets import Dataset
from pipeline.errors import StoreError
from pipeline.files import told_when_full
from pipeline.filler import Filling
from pipeline.filling import Report, count_blocks, fill_blocks
from pipeline.planning import plan_split, scan_dataset, store_attributes
from pipeline.preview import preview
from pipeline.progress import Progress
from pipeline.screening import Checked, bad_samples
from pipeline.source import Source
from pipeline.spec import CacheSpec
from pipeline.statistics import check_energy_kinds
from pipeline.store.reader import FeatureStore
from pipeline.store.writer import SplitPlan, StoreWriter, create_store
from pipeline.teacher import Teacher

log = logging.getLogger("pipeline.build")


@dataclass(frozen=True)
class Job:
    """A store to be built: what it is made from, and how it is planned."""

    source: Source
    plans: dict[str, SplitPlan]
    attributes: dict[str, Any]


def prepare(
    spec: CacheSpec, device: str = "cpu", before: FeatureStore | None = None
) -> Job:
    """Load the teacher, read every dataset once, plan every split; writes nothing.

    Edges are counted and encodings calibrated only for a store that is not there yet:
    one that is knows them. With ``before``, the store there is planned anew, its own
    encodings kept.

    Raises
    ------
    SpecError, DataError, CheckpointError
        Anything that would make the build fail later and can be known now.
    """
    source, bad = _screened(Source.open(spec, device))
    check_energy_kinds(spec.splits, source.datasets)
    new = before is not None or not Path(spec.store.path).exists()
    old = {} if before is None else before.splits
    scans = {
        name: scan_dataset(
            _checked(dataset, source.teacher),
            spec.splits[name].reference_energies,
            source.edge_counter(name) if new else None,
        )
        for name, dataset in source.datasets.items()
    }
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
    if bad:
        attributes["provenance"]["bad_samples"] = bad
    if new and source.teacher is not None:
        attributes["provenance"]["preview"] = {
            name: preview(name, dataset, source.teacher, source.fields(name))
            for name, dataset in source.datasets.items()
        }
    return Job(source, plans, attributes)


def _screened(source: Source) -> tuple[Source, dict[str, list[list[str]]]]:
    """``source`` without the samples that its spec lets out; their ids and reasons."""
    found = {}
    for name, split in source.spec.splits.items():
        if split.on_bad_sample == "skip":
            bad = bad_samples(name, source.datasets[name], source.teacher)
            if bad:
                source = source.leaving_out(name, [sample_id for sample_id, _ in bad])
                found[name] = [list(pair) for pair in bad]
    return source, found


def _checked(dataset: Dataset, teacher: Teacher | None) -> Dataset:
    """``dataset``, whose samples are refused when the teacher cannot take them."""
    if teacher is None:
        return dataset
    potential = teacher.potential
    return Checked(dataset, potential.elements, potential.graph_rule)


def build_store(
    spec: CacheSpec,
    *,
    filling: Filling | None = None,
    report: Report = lambda split, samples, blocks_left: None,
    progress: Progress | None = None,
) -> bool:
    """Create or continue the store of ``spec``; True once it is sealed.

    ``filling`` says which blocks are filled and by whom; the bytes written are the
    same. ``progress`` is kept up to date.

    Raises
    ------
    DataError, StoreError
        A store of another fingerprint lies at the path, or blocks could not be written.
    WorkersError
        The workers are gone, or do not see what they need.
    """
    filling = filling or Filling()
    progress = progress or Progress()
    # Workers of a cluster choose for themselves; they may have what is missing here.
    device = filling.device if filling.scheduler is None else None
    job = prepare(spec, str(chosen_device(device)))
    path = Path(spec.store.path)
    with told_when_full(path):
        create_or_match(job, path)
        writer = StoreWriter(path)
        if writer.sealed:
            count_blocks(progress, writer)
            return True
        with nullcontext() if filling.blocks else writer.claim_all():
            fill_blocks(job.source, writer, filling, report, progress)
        if any(writer.pending_blocks(split) for split in job.plans):
            return False
        progress.state = "sealing"
        writer.seal()
        log.info("%s: sealed", path)
        return True


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
