"""Writes a store again with other profiles: smaller, or faster to read."""

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.build.plan import array_attributes, array_identity, stored_dtype
from pipeline.errors import SpecError, StoreError
from pipeline.fields import CHANNEL_FIELDS
from pipeline.files.atomic import disk_full_as_error, is_free
from pipeline.parallel.ordered_map import (
    Count,
    ignore_counts,
    processes,
    useful_workers,
)
from pipeline.spec.sections import FeatureSpec
from pipeline.store.calibration import (
    CALIBRATION_ROWS,
    Calibration,
    calibrate,
    known_calibration,
)
from pipeline.store.index import METADATA, SplitIndex
from pipeline.store.layout import BlockPlan
from pipeline.store.metadata import read_attributes
from pipeline.store.reader import FeatureStore, SplitReader
from pipeline.store.reused_shards import ReusedShards
from pipeline.store.writer import ArrayPlan, SplitPlan, StoreWriter, create_store

log = logging.getLogger("pipeline.build.convert")
BlockCallback = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Conversion:
    """Which fields are stored anew, and how; all others are copied byte for byte.

    Without ``fields`` it is every feature of the store that can be.
    """

    feature: FeatureSpec
    fields: Collection[str] = ()

    @property
    def options(self) -> dict[str, Any]:
        """How fields are stored, by the names that fingerprints of stores have."""
        feature = self.feature
        return {
            "profile": feature.profile,
            "error": feature.max_relative_error,
            "dtype": feature.dtype,
        }

    def paths(self, split: SplitReader) -> set[str]:
        """Arrays of a split to store anew.

        Raises
        ------
        SpecError
            A named field is no feature.
        """
        for name in self.fields:
            if name not in CHANNEL_FIELDS.values():
                known = ", ".join(CHANNEL_FIELDS.values())
                raise SpecError(
                    f"--field {name!r} is not a feature; choose from {known}."
                )
        chosen = {
            path
            for path, name in CHANNEL_FIELDS.items()
            if path in split.arrays and (not self.fields or name in self.fields)
        }
        return {path for path in chosen if not self._is_there(split, path)}

    def _is_there(self, split: SplitReader, path: str) -> bool:
        """Whether an array has what is asked for already."""
        wanted = self.feature
        encoding = split.encoding(path)
        if encoding is None:
            dtype = stored_dtype(CHANNEL_FIELDS[path], wanted)
            return wanted.profile == "faithful" and split.arrays[path].dtype == dtype
        return encoding.profile == wanted.profile == "q8"


def convert_store(
    source: Path | str,
    out: Path,
    conversion: Conversion,
    report: BlockCallback = lambda split, samples, blocks_left: None,
    workers: int = 0,
    count: Count = ignore_counts,
) -> None:
    """Write the store at ``source`` to ``out`` as ``conversion`` says, and seal it.

    Blocks are converted by so many ``workers``, or by this process. ``report`` is told
    of every block that is, ``count`` of those that are checked at the end.

    May be killed at any moment and called again. The new store has the same blocks and
    samples; encodings are calibrated on the features of its first samples, which its
    random order makes a fair mixture.

    Raises
    ------
    SpecError
        There is nothing to convert.
    StoreError
        Another store lies at ``out``, or the source is not finished.
    DamagedStoreError
        A byte of the source is not what was written.
    """
    store = FeatureStore.open(source)
    chosen = {name: conversion.paths(split) for name, split in store.splits.items()}
    if not any(chosen.values()):
        raise SpecError(
            f"{source} has no field to store as {conversion.feature.profile}; "
            "`kd-cache info` lists its fields."
        )
    fingerprint = _fingerprint(store, conversion, chosen)
    with disk_full_as_error(out):
        if is_free(out):
            plans = [
                _plan(split, conversion.feature, chosen[name])
                for name, split in store.splits.items()
            ]
            create_store(out, plans, _attributes(store, plans, conversion, fingerprint))
        writer = StoreWriter(out)
        if writer.attributes.get("fingerprint") != fingerprint:
            raise StoreError(
                f"{out} was not made from {source} with these options; choose another "
                "place or remove it."
            )
        if writer.sealed:
            return
        pending = [
            (name, block)
            for name in store.splits
            for block in writer.pending_blocks(name, verify=True)
        ]
        with processes(workers) as run:
            done = run(_Converter(source, out, chosen), pending)
            for number, (name, samples) in enumerate(done, 1):
                report(name, samples, len(pending) - number)
        blocks = sum(split.n_blocks for split in writer.splits.values())
        writer.seal(useful_workers(workers, blocks), count)


class _Converter:
    """Converts blocks of one store; another process that is sent it opens the stores.

    ``chosen`` are the paths that are stored anew, by split.
    """

    def __init__(
        self, source: Path | str, out: Path, chosen: Mapping[str, Collection[str]]
    ) -> None:
        self._made_of = source, out, chosen
        self._splits = FeatureStore.open(source).splits
        self._writer = StoreWriter(out)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Converter, self._made_of

    def __call__(self, item: tuple[str, int]) -> tuple[str, int]:
        """Convert a block unless it is there; returns its split and samples."""
        name, block = item
        split, paths = self._splits[name], self._made_of[2][name]
        with self._writer.claim_block(name, block) as missing:
            if missing:
                target = self._writer.splits[name]
                anew = {
                    path for p in paths for path in (p, *target.fields[p].scale_arrays)
                }
                rows = split.read_block(block, list(paths))
                adopted = ReusedShards(split.index, target.arrays.keys() - anew)
                self._writer.write_block(name, block, rows, adopted)
        return name, len(split.block_positions(block))


def _plan(
    split: SplitReader, feature: FeatureSpec, paths: Collection[str]
) -> SplitPlan:
    calibrations: dict[str, Calibration] = {}
    for path in sorted(paths) if feature.profile != "faithful" else ():
        few = int(np.searchsorted(np.cumsum(split.n_atoms), CALIBRATION_ROWS)) + 1
        rows = split.read(np.arange(min(few, len(split))), [path])[path]
        rows = rows[:CALIBRATION_ROWS]
        assert feature.profile != "faithful"
        calibrations[path] = calibrate(
            rows, feature.profile, feature.stated_error or 0.0
        )
        log.info("splits.%s: %s is calibrated on %d rows", split.name, path, len(rows))
    arrays = tuple(
        _read_for_rewrite(split, path, feature, calibrations.get(path))
        if path in paths
        else _keep_array(split.index, path)
        for path in split.arrays
    )
    return _copy_plan(split.index, arrays)


def _copy_plan(index: SplitIndex, arrays: tuple[ArrayPlan, ...]) -> SplitPlan:
    """Plan of a split with the blocks of ``index`` and other arrays."""
    blocks = BlockPlan(
        order=np.arange(len(index.start)),
        start=index.start,
        n_atoms=index.n_atoms,
        sample_row=index.sample_row,
        block_bounds=index.block_bounds,
        rows_per_block=index.rows_per_block,
        samples_per_block=index.samples_per_block,
        edges=index.edges,
    )
    ids = [str(name) for name in index.sample_ids]
    return SplitPlan(index.name, ids, index.checksums, blocks, arrays)


def _read_for_rewrite(
    split: SplitReader, path: str, feature: FeatureSpec, chosen: Calibration | None
) -> ArrayPlan:
    info, name = split.arrays[path], CHANNEL_FIELDS[path]
    return ArrayPlan(
        path=path,
        level=info.level,
        shape=info.shape,
        dtype=stored_dtype(name, feature),
        attributes=array_attributes(name, feature),
        calibration=chosen,
    )


def _keep_array(index: SplitIndex, path: str) -> ArrayPlan:
    info = index.fields[path]
    return ArrayPlan(
        path,
        info.level,
        info.shape,
        info.dtype.name,
        read_attributes(index.place, f"{index.name}/{path}/{METADATA}"),
        known_calibration(info),
    )


def _fingerprint(
    store: FeatureStore, conversion: Conversion, chosen: Mapping[str, Collection[str]]
) -> str:
    identity = {
        "made_from": store.fingerprint,
        "feature": conversion.options,
        "arrays": {name: sorted(paths) for name, paths in chosen.items()},
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _attributes(
    store: FeatureStore,
    plans: list[SplitPlan],
    conversion: Conversion,
    fingerprint: str,
) -> dict[str, Any]:
    """Attributes of the source, its errors, and what was done to it."""
    kept = {
        key: value
        for key, value in store.attributes.items()
        if key not in ("format_version", "complete")
    }
    errors = {
        name: {
            path: split.error(path)
            for path in split.arrays
            if split.encoding(path) is not None
        }
        for name, split in store.splits.items()
    }
    return {
        **kept,
        "fingerprint": fingerprint,
        "arrays": {p.name: [array_identity(a) for a in p.arrays] for p in plans},
        "made_from": {
            "fingerprint": store.fingerprint,
            "relative_squared_error": errors,
            "feature": conversion.options,
            "before": store.attributes.get("made_from"),
        },
    }


def make_conversion(
    profile: Literal["faithful", "q8", "compact"],
    *,
    error: float | None = None,
    dtype: Literal["float16", "float32"] | None = None,
    fields: Collection[str] = (),
) -> Conversion:
    """A conversion, its options checked.

    Raises
    ------
    SpecError
        An option does not go with the profile.
    """
    if error is not None and not 0 < error < 1:
        raise SpecError(f"--error {error:g} must lie between 0 and 1.")
    if profile != "compact" and error is not None:
        raise SpecError(f"--error is for profile compact, not for {profile}.")
    return Conversion(
        FeatureSpec(profile=profile, max_relative_error=error, dtype=dtype), fields
    )
