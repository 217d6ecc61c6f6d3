"""Adds fields and splits that a spec gained to a finished store.

The extended store is built beside the old one, whose shards it shares by hard links,
and takes its place in one step: the old one stays whole and readable until then.
"""

import ctypes
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.build.build import (
    BuildPlan,
    check_and_seal,
    count_into,
    create_or_match,
    make_build_plan,
)
from pipeline.build.fill import BlockCallback, fill_blocks
from pipeline.build.status import BuildStatus
from pipeline.build.worker import FillOptions
from pipeline.errors import SpecError, StoreError
from pipeline.files.atomic import disk_full_as_error, sync_folder
from pipeline.parallel.ordered_map import Count, ignore_counts
from pipeline.spec.cache_spec import CacheSpec
from pipeline.spec.yaml_model import as_json
from pipeline.store.creation import remove_leftovers
from pipeline.store.index import METADATA
from pipeline.store.reader import FeatureStore
from pipeline.store.writer import StoreWriter

log = logging.getLogger("pipeline.build.extend")

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def extend_store(
    spec: CacheSpec,
    *,
    filling: FillOptions | None = None,
    report: BlockCallback = lambda split, samples, blocks_left: None,
    count: Count = ignore_counts,
    progress: BuildStatus | None = None,
) -> list[str]:
    """Add to the store of ``spec`` what it lacks; names what was added.

    May be killed at any moment and called again. The result is what `build_store` makes
    of the same spec from nothing, bit for bit; only new fields are computed.

    Raises
    ------
    SpecError
        Teacher, data or known fields are not those that the store was made from.
    StoreError
        There is no finished store, or another process is extending it.
    """
    filling = replace(filling or FillOptions(), before=Path(spec.store.path))
    progress = progress or BuildStatus()
    count = count_into(progress, count)
    path = Path(spec.store.path)
    staging = path.with_name(f".{path.name}.extended")
    with disk_full_as_error(path), _lock_store(path):
        _finish_exchange(path, staging)
        before = FeatureStore.open(path)
        job = make_build_plan(
            spec, filling.device or "cpu", before, filling.workers, count
        )
        if before.fingerprint == job.attributes["fingerprint"]:
            _remove(staging)
            return []
        added = _additions(before.attributes, as_json(job.attributes))
        log.info("%s: adding %s", path, ", ".join(added))
        _build_staging(job, staging, filling, report, count, progress)
        _exchange(staging, path)
        _remove(staging)
        return added


def _build_staging(
    job: BuildPlan,
    staging: Path,
    filling: FillOptions,
    report: BlockCallback,
    count: Count,
    progress: BuildStatus,
) -> None:
    wanted = job.attributes["fingerprint"]
    if staging.exists() and not _continues(staging, wanted):
        _remove(staging)
    create_or_match(job, staging)
    writer = StoreWriter(staging)
    if not writer.sealed:
        fill_blocks(job.source, writer, filling, report, progress)
        check_and_seal(writer, filling.workers, progress, count)


def _continues(staging: Path, fingerprint: str) -> bool:
    """Whether ``staging`` is the beginning of the store with this fingerprint."""
    try:
        return StoreWriter(staging).attributes["fingerprint"] == fingerprint
    except StoreError:
        # A store that was being removed when it was killed.
        return False


def _remove(staging: Path) -> None:
    """Remove a store that is not needed and what its creation may have left.

    Its root goes first, so that after a kill the rest passes for no store.
    """
    remove_leftovers(staging)
    (staging / METADATA).unlink(missing_ok=True)
    shutil.rmtree(staging, ignore_errors=True)


def _additions(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Arrays and splits that only the new attributes have; all else must agree."""
    for key in ("rows_per_block", "order_seed"):
        _require_equal(f"store.{key}", old[key], new[key])
    _require_same_teacher(old["teacher"], new["teacher"])
    added = []
    for name, split in old["splits"].items():
        if name not in new["splits"]:
            raise SpecError(
                f"The store has a split {name!r} that the spec lacks; add-field adds "
                "what a spec gained and removes nothing, so put it back."
            )
        for key, value in split.items():
            _require_equal(f"splits.{name}: {key}", value, new["splits"][name][key])
        known = {array[0]: array for array in old["arrays"][name]}
        planned = {array[0]: array for array in new["arrays"][name]}
        for path, array in known.items():
            _require_equal(f"splits.{name}: {path}", array, planned.get(path))
        added += [f"{name}/{path}" for path in planned if path not in known]
    return added + [f"split {n}" for n in new["splits"] if n not in old["splits"]]


def _require_same_teacher(
    old: dict[str, Any] | None, new: dict[str, Any] | None
) -> None:
    if old is None or new is None:
        _require_equal("teacher", old and old["model"], new and new["model"])
        return
    for key in old.keys() | new.keys():
        if key == "layers":
            for field, layer in old[key].items():
                _require_equal(f"layer of {field}", layer, new[key].get(field))
        else:
            _require_equal(f"teacher: {key}", old.get(key), new.get(key))


def _require_equal(what: str, old: object, new: object) -> None:
    if old != new:
        raise SpecError(
            f"{what} is {_short(old)} in the store and {_short(new)} by the spec; "
            "add-field changes nothing that is there, so set it back or build another "
            "store."
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


@contextmanager
def _lock_store(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.extending.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StoreError(f"{path} is being extended by another process.") from None
    try:
        yield
    finally:
        # Removed while held: whoever waits sees that it is gone and makes its own.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _exchange(new: Path, path: Path) -> None:
    """Let two folders change places, at once where the system can do that."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = os.fsencode(new), os.fsencode(path)
    if renameat2 is None or renameat2(
        _AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE
    ):
        path.rename(_aside_path(path))
        new.rename(path)
        _aside_path(path).rename(new)
    sync_folder(path.parent)


def _finish_exchange(path: Path, staging: Path) -> None:
    """Put the old store back where a kill came between the renames of `_exchange`."""
    aside = _aside_path(path)
    if aside.exists():
        aside.rename(staging if path.exists() else path)
        sync_folder(path.parent)


def _aside_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.aside")
