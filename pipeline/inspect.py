"""What `kd-cache info` tells of a store, and what `verify --repair` undoes."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.contents import contents_table
from pipeline.errors import StoreError
from pipeline.fields import CHANNEL_FIELDS
from pipeline.files import write_atomically
from pipeline.store.packed import SHUFFLE
from pipeline.store.reader import ArrayInfo, FeatureStore, SplitReader
from pipeline.store.verify import Problem
from pipeline.store.writer import StoreWriter

_LETTERS = {"node": "N", "edge": "E", "sample": "S"}
_TABLE = (
    *("split", "samples", "atoms", "blocks", "field", "shape", "dtype", "profile"),
    *("bytes per sample", "bytes", "relative squared error"),
)
_COUNTED = {"sample": "samples", "node": "atoms", "edge": "edges"}


def describe_store(path: Path | str) -> dict[str, Any]:
    """Fingerprint, teacher, splits, fields and sizes of the store; JSON-able.

    Works on unsealed stores too, and then counts the blocks that are done.
    """
    store = FeatureStore.open(path, allow_unsealed=True)
    teacher = store.attributes["teacher"]
    complete = store.attributes["complete"]
    # Stores of older versions do not say it.
    labelled = store.attributes.get("provenance", {}).get("labelled", {})
    return {
        "path": str(path),
        "format_version": store.attributes["format_version"],
        "complete": complete,
        "fingerprint": store.fingerprint,
        "teacher": None if teacher is None else _teacher_summary(teacher),
        "preview": store.attributes.get("provenance", {}).get("preview", {}),
        "left_out": {name: len(bad) for name, bad in _bad_samples(store).items()},
        "contents": store.attributes.get("provenance", {}).get("contents", {}),
        "splits": {
            name: _describe_split(split, complete) | {"labelled": labelled.get(name)}
            for name, split in store.splits.items()
        },
        "advice": _advice(store),
    }


def _bad_samples(store: FeatureStore) -> dict[str, list[list[str]]]:
    """Id and reason of the samples that the store was planned without, by split."""
    return dict(store.attributes.get("provenance", {}).get("bad_samples", {}))


def _teacher_summary(teacher: dict[str, Any]) -> dict[str, Any]:
    kept = ("model", "checkpoint_sha256", "weights", "precision", "graph_rule")
    found = {key: teacher[key] for key in kept if key in teacher}
    return found | {"layers": teacher.get("layers", {})}


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
    if info.effort is None:
        return "bytes+crc32c"
    rotated = info.encoding is not None and info.encoding.rotation is not None
    turned = "rotation+" if rotated else ""
    return f"{turned}transpose+blosc-zstd{info.effort}-{SHUFFLE}+crc32c"


def _advice(store: FeatureStore) -> list[str]:
    """What a user who trains on this store should know of reading it."""
    lines = []
    for name, split in store.splits.items():
        features = [path for path in split.arrays if path in CHANNEL_FIELDS]
        if not features:
            continue
        size = sum(split.bytes_stored(path) for path in features)
        window = split.window_blocks(features)
        if window is not None:
            lines.append(
                f"split {name}: chunks are decoded as they are read; samples are "
                f"shuffled within {min(window, split.n_blocks)} of {split.n_blocks} "
                "blocks at a time, and `kd-cache hydrate` makes a copy that is read "
                "many times faster"
            )
        elif size > _memory():
            lines.append(
                f"split {name}: {size / 1e9:.0f} GB of features do not fit into the "
                f"{_memory() / 1e9:.0f} GB of memory here, so every epoch reads the "
                "disk; keep the store on a local one, or store q8, half the size"
            )
        else:
            lines.append(
                f"split {name}: {size / 1e6:.1f} MB of features fit into memory; they "
                "are read where they lie, in any order"
            )
    return lines


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def render_description(description: dict[str, Any]) -> str:
    """The description as text for a terminal."""
    state = "complete, sealed" if description["complete"] else "NOT complete"
    lines = [
        f"{description['path']}  (format {description['format_version']}, {state})",
        f"fingerprint  {description['fingerprint']}",
        *_teacher_lines(description["teacher"]),
        "codec        bytes+crc32c where nothing else is said",
    ]
    for split, found in description["preview"].items():
        errors = found.get("precision_error", {})
        told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        lines += [f"error        of reduced precision, {split}: {told}"] if told else []
    for name, split in description["splits"].items():
        lines += ["", *_split_lines(name, split)]
    checked = checked_lines(description)
    lines += ["", *checked] if checked else []
    lines += ["", *description["advice"]] if description["advice"] else []
    return "\n".join(lines)


def planned_contents(path: Path | str) -> str:
    """What planning found in the data of the store at ``path``, as a table."""
    header = FeatureStore.open(path, allow_unsealed=True)
    found = header.attributes.get("provenance", {})
    return "\n".join(
        checked_lines(
            {
                "contents": found.get("contents", {}),
                "left_out": {n: len(bad) for n, bad in _bad_samples(header).items()},
                "preview": found.get("preview", {}),
            }
        )
    )


def checked_lines(description: Mapping[str, Any]) -> list[str]:
    """What planning found: a table of the splits, forces against the teacher's.

    Stores of older versions have the number of bad samples alone.
    """
    left_out = description["left_out"]
    if description["contents"]:
        lines = contents_table(description["contents"], left_out)
    else:
        lines = [f"{n} samples of split {s} were left out" for s, n in left_out.items()]
    for split, found in description["preview"].items():
        forces = found.get("forces")
        if forces is not None:
            lines.append(
                f"forces of the labels against the teacher's, {forces['samples']} "
                f"samples of {split}: cosine {forces['cosine']:.2f}, RMS ratio "
                f"{forces['rms_ratio']:.3g}"
            )
    return lines


def _teacher_lines(teacher: dict[str, Any] | None) -> list[str]:
    if teacher is None:
        return ["teacher      none (labels only)"]
    first = (
        f"teacher      {teacher['model']}, {teacher['precision']}, weights "
        f"{teacher.get('weights', 'its own')}, "
        f"sha256 {teacher['checkpoint_sha256'][:16]}…"
    )
    layers = [f"layer        {name} from {k}" for name, k in teacher["layers"].items()]
    return [first, *layers]


def _split_lines(name: str, split: dict[str, Any]) -> list[str]:
    counted = ", ".join(f"{split[k]} {k}" for k in _COUNTED.values() if k in split)
    done = f"{split['blocks_done']} of {split['blocks']} blocks"
    lines = [f"split {name}: {counted}, {done}{_labels_told(split)}"]
    for path, field in split["fields"].items():
        shape = "(" + ", ".join(str(size) for size in field["shape"]) + ")"
        size, error = field["bytes_per_sample"], field["relative_squared_error"]
        told = "" if field["profile"] == "faithful" else f"  {field['profile']}"
        told += "" if error is None else f", relative squared error {error:.2e}"
        told += "" if "blosc" not in field["codec"] else f", {field['codec']}"
        lines.append(
            f"  {path:32} {shape:16} {field['dtype']:8} {size:10.1f} B/sample{told}"
        )
    total = sum(field["bytes_per_sample"] for field in split["fields"].values())
    return [*lines, f"  {'':58}{total:10.1f} B/sample together"]


def field_table(description: dict[str, Any]) -> str:
    """The fields of all splits as CSV, one a line; sizes in bytes."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_TABLE)
    for name, split in description["splits"].items():
        for path, field in split["fields"].items():
            size = field["bytes_per_sample"]
            table.writerow(
                [
                    *(name, split["samples"], split["atoms"], split["blocks"], path),
                    *("×".join(str(s) for s in field["shape"]), field["dtype"]),
                    *(field["profile"], round(size, 1), round(size * split["samples"])),
                    field["relative_squared_error"],
                ]
            )
    return text.getvalue()


def _labels_told(split: dict[str, Any]) -> str:
    known = split["labelled"]
    if known is None:
        return ""
    if not any(known.values()):
        return "; no labels of the source"
    return f"; energies of {known['energy']} and forces of {known['forces']} samples"


def discard_damaged(path: Path | str, problems: Sequence[Problem]) -> str:
    """Discard the blocks and clean the files that ``problems`` name.

    Returns a sentence on what was done and what is next.

    Raises
    ------
    StoreError
        The store is no folder, so nothing in it can be changed.
    """
    if not Path(path).is_dir():
        raise StoreError(f"{path} is no folder on this machine; repair the original.")
    blocks = {
        (problem.split, problem.block)
        for problem in problems
        if problem.split is not None and problem.block is not None
    }
    cleaned = [problem for problem in problems if problem.cleaned is not None]
    for problem in cleaned:
        assert problem.cleaned is not None
        write_atomically(Path(path) / problem.file, problem.cleaned)
    if len(cleaned) == len(problems):
        return f"{len(cleaned)} metadata file(s) cleaned; nothing else is to be done."
    if not blocks:
        return "No single block is to blame; build the store again from its spec."
    writer = StoreWriter(path)
    for split, block in sorted(blocks):
        writer.discard_block(split, block)
    return (
        f"{len(blocks)} damaged block(s) discarded; `kd-cache build SPEC` writes "
        "them again."
    )
