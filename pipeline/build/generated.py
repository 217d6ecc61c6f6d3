"""Generated splits of a build: their files next to the store, and what they cost."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.build.scan_cache import ScanCache
from pipeline.datasets import Dataset
from pipeline.fields import FIELDS, TEACHER_VIRIAL
from pipeline.files.atomic import is_free
from pipeline.generate.dataset import GeneratedDataset
from pipeline.generate.run import (
    count_passes,
    estimate_passes,
    make_pieces,
    missing_pieces,
)
from pipeline.parallel.ordered_map import Count, OrderedMap, Tally
from pipeline.spec.cache_spec import CacheSpec
from pipeline.store.backends import LocalBackend
from pipeline.store.index import ROOT_KEY
from pipeline.store.metadata import read_root
from pipeline.store.plan import SplitPlan
from pipeline.teachers.runner import TeacherRunner

if TYPE_CHECKING:
    from pipeline.build.inputs import BuildInputs

log = logging.getLogger("pipeline.build.generated")
# A change of the methods that gives other structures needs another number.
_VERSION = 1
_VIRIAL = FIELDS[TEACHER_VIRIAL].path


def wrap_generated(
    spec: CacheSpec,
    datasets: Mapping[str, Dataset],
    sidecar: ScanCache,
    teacher: TeacherRunner,
) -> dict[str, Dataset]:
    """Return the generated datasets by split; ``datasets`` has what they come from."""
    folder = Path(spec.store.path).with_name(Path(spec.store.path).name + ".generated")
    found: dict[str, Dataset] = {}
    for name, split in spec.splits.items():
        if split.generate is not None:
            key = _key(sidecar.key(name), teacher)
            closest = split.min_pair_distance or None
            found[name] = GeneratedDataset(
                datasets[name], split.generate, folder / name, key, closest
            )
    return found


def make_structures(
    source: "BuildInputs", may_be_finished: bool, run: OrderedMap, count: Count
) -> None:
    """Make the structures of generated splits that are not there yet.

    A kill loses at most one piece. A sealed store needs none of them.

    Parameters
    ----------
    may_be_finished
        Whether a sealed store is left as it is.
    count
        Called with the number of structures made so far, and of all missing ones.

    Raises
    ------
    DataError
        A sample cannot be used or displaced.
    """
    datasets = _generated(source)
    if not datasets or source.teacher is None:
        return
    if may_be_finished and _is_sealed(Path(source.spec.store.path)):
        datasets = {n: d for n, d in datasets.items() if n not in source.known}
    missing = {name: missing_pieces(dataset) for name, dataset in datasets.items()}
    if not any(missing.values()):
        return
    copies = sum(
        len(datasets[name].piece_parents(piece)) * datasets[name].spec.copies
        for name, pieces in missing.items()
        for piece in pieces
    )
    tally = Tally(count, copies)
    for name, dataset in datasets.items():
        if missing[name]:
            log.info(
                "splits.%s: %s makes %d structures by about %d teacher passes",
                name,
                dataset.spec.method,
                len(dataset),
                estimate_passes(dataset),
            )
            make_pieces(name, dataset, missing[name], source.teacher, run, tally.add)


def count_teacher_passes(
    source: "BuildInputs", plans: Mapping[str, SplitPlan]
) -> dict[str, dict[str, int]]:
    """Return the teacher passes over single structures that each planned split costs.

    ``labels`` of its samples, ``generation`` of its structures, ``force_jacobian`` of
    its columns. Draws that were refused count in ``generation``.
    """
    assert source.teacher is not None
    generated = _generated(source)
    found = {}
    for name, dataset in source.datasets.items():
        fields = source.fields(name)
        stored = {array.path for array in plans[name].arrays}
        # Generation keeps energies and forces.
        known = name in generated and not fields and _VIRIAL not in stored
        columns = source.teacher.columns.count if "force_jacobian" in fields else 0
        made = count_passes(generated[name])["passes"] if name in generated else 0
        found[name] = {
            "labels": 0 if known else len(dataset),
            "generation": made,
            "force_jacobian": 2 * columns * len(dataset),
        }
    return found


def _generated(source: "BuildInputs") -> dict[str, GeneratedDataset]:
    return {
        name: dataset
        for name, dataset in source.generated.items()
        if isinstance(dataset, GeneratedDataset)
    }


def _key(listing: str, teacher: TeacherRunner) -> str:
    """Hash of what decides the structures: the samples, the settings, the teacher."""
    identity = {k: v for k, v in teacher.identity.items() if k != "layers"}
    document = [_VERSION, listing, json.dumps(identity, sort_keys=True, default=str)]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def _is_sealed(store: Path) -> bool:
    if is_free(store):
        return False
    return bool(read_root(LocalBackend(store))[ROOT_KEY]["complete"])
