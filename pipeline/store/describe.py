"""Contents, sizes and codecs of a store, as plain data."""

import logging
import os
from pathlib import Path
from typing import Any

from pipeline.errors import StoreError
from pipeline.fields import CHANNEL_FIELDS, FIELDS
from pipeline.files.remote import is_url
from pipeline.store.compressed import SHUFFLE
from pipeline.store.reader import ArrayInfo, FeatureStore, SplitReader
from pipeline.store.teacher_error import TeacherError, measure_teacher, warn_of_unlike

log = logging.getLogger("pipeline.store.describe")
_LETTERS = {"node": "N", "edge": "E", "sample": "S"}


def describe_store(path: Path | str) -> dict[str, Any]:
    """Fingerprint, teacher, splits, fields and sizes of the store; JSON-able.

    Works on unsealed stores too, and then counts the blocks that are done. The teacher
    is compared with the labels if the store is complete and no URL.
    """
    store = FeatureStore.open(path, allow_unsealed=True)
    teacher = store.attributes["teacher"]
    complete = store.attributes["complete"]
    # Stores of older versions do not say it.
    labelled = store.attributes.get("provenance", {}).get("labelled", {})
    errors = {} if is_url(path) or not complete else _teacher_errors(store)
    return {
        "path": str(path),
        "format_version": store.attributes["format_version"],
        "complete": complete,
        "fingerprint": store.fingerprint,
        "teacher": None if teacher is None else _teacher_summary(teacher),
        "teacher_errors": {name: error.to_dict() for name, error in errors.items()},
        "teacher_warning": warn_of_unlike(errors),
        "preview": store.attributes.get("provenance", {}).get("preview", {}),
        "teacher_passes": _teacher_passes(store),
        "left_out": {name: len(bad) for name, bad in _bad_samples(store).items()},
        "contents": store.attributes.get("provenance", {}).get("contents", {}),
        "splits": {
            name: _describe_split(split, complete) | {"labelled": labelled.get(name)}
            for name, split in store.splits.items()
        },
        "advice": _advice(store),
    }


def describe_contents(path: Path | str) -> dict[str, Any]:
    """Return what planning found in the data of the store at ``path``; JSON-able."""
    store = FeatureStore.open(path, allow_unsealed=True)
    found = store.attributes.get("provenance", {})
    return {
        "contents": found.get("contents", {}),
        "left_out": {name: len(bad) for name, bad in _bad_samples(store).items()},
        "preview": found.get("preview", {}),
        "teacher_passes": _teacher_passes(store),
    }


def _teacher_passes(store: FeatureStore) -> dict[str, dict[str, int]]:
    """Passes of the teacher over single structures, by split and by their use."""
    found = store.attributes.get("provenance", {}).get("teacher_passes", {})
    return {str(name): dict(passes) for name, passes in found.items()}


def _bad_samples(store: FeatureStore) -> dict[str, list[list[str]]]:
    """Id and reason of the samples that the store was planned without, by split."""
    return dict(store.attributes.get("provenance", {}).get("bad_samples", {}))


def _teacher_summary(teacher: dict[str, Any]) -> dict[str, Any]:
    kept = ("model", "checkpoint_sha256", "weights", "precision", "graph_rule")
    found = {key: teacher[key] for key in kept if key in teacher}
    return found | {"layers": teacher.get("layers", {})}


def _teacher_errors(store: FeatureStore) -> dict[str, TeacherError]:
    """Compare the teacher with the labels of every split that has both."""
    found: dict[str, TeacherError] = {}
    for name, split in store.splits.items():
        if FIELDS["teacher_energy"].path not in split.arrays:
            continue
        try:
            error = measure_teacher(split)
        except StoreError as damage:
            # The metadata are worth reading even so.
            log.warning("%s", damage)
            continue
        if error is not None:
            found[name] = error
    return found


def _describe_split(split: SplitReader, complete: bool) -> dict[str, Any]:
    counts = {"samples": len(split), "atoms": int(split.n_atoms.sum())}
    if any(info.level == "edge" for info in split.arrays.values()):
        counts["edges"] = int(split.n_edges.sum())
    missing = 0 if complete else len(split.missing_blocks())
    return {
        **counts,
        "blocks": split.n_blocks,
        "blocks_done": split.n_blocks - missing,
        "fields": {
            path: {
                "shape": [_LETTERS[info.level], *info.shape],
                "dtype": str(info.dtype),
                "profile": _profile(info),
                "codec": _codec(info),
                "relative_squared_error": split.error(path) if complete else None,
                "bytes_per_sample": split.bytes_stored(path) / len(split),
            }
            for path, info in split.arrays.items()
        },
    }


def _profile(info: ArrayInfo) -> str:
    return "faithful" if info.encoding is None else info.encoding.profile


def _codec(info: ArrayInfo) -> str:
    if info.clevel is None:
        return "bytes+crc32c"
    rotated = info.encoding is not None and info.encoding.rotation is not None
    turned = "rotation+" if rotated else ""
    return f"{turned}transpose+blosc-zstd{info.clevel}-{SHUFFLE}+crc32c"


def _advice(store: FeatureStore) -> list[str]:
    """What a user who trains on this store should know of reading it."""
    lines = []
    for name, split in store.splits.items():
        features = [path for path in split.arrays if path in CHANNEL_FIELDS]
        if not features:
            continue
        size = sum(split.bytes_stored(path) for path in features)
        window = split.max_shuffle_blocks(features)
        if window is not None:
            lines.append(
                f"split {name}: every read decodes chunks; samples are shuffled "
                f"within {min(window, split.n_blocks)} of {split.n_blocks} blocks "
                "at a time, and `kd-cache hydrate` makes a copy that reads many "
                "times faster"
            )
        elif size > _memory():
            lines.append(
                f"split {name}: {size / 1e9:.0f} GB of features do not fit into the "
                f"{_memory() / 1e9:.0f} GB of memory, so every epoch reads the "
                "disk; keep the store on a local disk, or store q8, half the size"
            )
        else:
            lines.append(
                f"split {name}: {size / 1e6:.1f} MB of features fit into memory; "
                "they are read from the store, in any order"
            )
    return lines


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
