"""What `kd-cache info` tells of a store, and what `verify --repair` undoes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.store.reader import FeatureStore, SplitReader
from pipeline.store.verify import Problem
from pipeline.store.writer import StoreWriter

_LETTERS = {"node": "N", "edge": "E", "sample": "S"}
_COUNTED = {"sample": "samples", "node": "atoms", "edge": "edges"}


def describe_store(path: Path) -> dict[str, Any]:
    """Fingerprint, teacher, splits, fields and sizes of the store; JSON-able.

    Works on unsealed stores too, and then counts the blocks that are done.
    """
    store = FeatureStore.open(path, allow_unsealed=True)
    writer = StoreWriter(path)
    teacher = store.attributes["teacher"]
    return {
        "path": str(path),
        "format_version": store.attributes["format_version"],
        "complete": store.attributes["complete"],
        "fingerprint": store.fingerprint,
        "teacher": None if teacher is None else _teacher_summary(teacher),
        "preview": store.attributes.get("provenance", {}).get("preview", {}),
        "splits": {
            name: _describe_split(split, len(writer.pending_blocks(name)))
            for name, split in store.splits.items()
        },
    }


def _teacher_summary(teacher: dict[str, Any]) -> dict[str, Any]:
    kept = ("model", "checkpoint_sha256", "weights", "precision", "graph_rule")
    found = {key: teacher[key] for key in kept if key in teacher}
    return found | {"layers": teacher.get("layers", {})}


def _describe_split(split: SplitReader, missing: int) -> dict[str, Any]:
    counts = {"samples": len(split), "atoms": int(split.n_atoms.sum())}
    if any(info.level == "edge" for info in split.arrays.values()):
        counts["edges"] = int(split.n_edges.sum())
    rows = {level: counts.get(name, 0) for level, name in _COUNTED.items()}
    fields = {
        path: {
            "shape": [_LETTERS[info.level], *info.shape],
            "dtype": str(info.dtype),
            "bytes_per_sample": info.row_bytes * rows[info.level] / len(split),
        }
        for path, info in split.arrays.items()
    }
    return {
        **counts,
        "blocks": split.n_blocks,
        "blocks_done": split.n_blocks - missing,
        "fields": fields,
    }


def render_description(description: dict[str, Any]) -> str:
    """The description as text for a terminal."""
    teacher = description["teacher"]
    state = "complete, sealed" if description["complete"] else "NOT complete"
    lines = [
        f"{description['path']}  (format {description['format_version']}, {state})",
        f"fingerprint  {description['fingerprint']}",
        "teacher      none (labels only)"
        if teacher is None
        else f"teacher      {teacher['model']}, {teacher['precision']}, weights "
        f"{teacher.get('weights', 'its own')}, "
        f"sha256 {teacher['checkpoint_sha256'][:16]}…",
    ]
    if teacher is not None:
        lines += [
            f"layer        {name} from {layer}"
            for name, layer in teacher["layers"].items()
        ]
    for split, found in description["preview"].items():
        errors = found.get("precision_error", {})
        told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        lines += [f"error        of reduced precision, {split}: {told}"] if told else []
    for name, split in description["splits"].items():
        counted = ", ".join(f"{split[k]} {k}" for k in _COUNTED.values() if k in split)
        lines.append(
            f"\nsplit {name}: {counted}, "
            f"{split['blocks_done']} of {split['blocks']} blocks"
        )
        for path, field in split["fields"].items():
            shape = "(" + ", ".join(str(size) for size in field["shape"]) + ")"
            size = field["bytes_per_sample"]
            lines.append(
                f"  {path:32} {shape:16} {field['dtype']:8} {size:10.1f} B/sample"
            )
        total = sum(field["bytes_per_sample"] for field in split["fields"].values())
        lines.append(f"  {'':58}{total:10.1f} B/sample together")
    return "\n".join(lines)


def discard_damaged(path: Path, problems: Sequence[Problem]) -> str:
    """Discard the blocks that ``problems`` name; says what to do next."""
    blocks = {
        (problem.split, problem.block)
        for problem in problems
        if problem.split is not None and problem.block is not None
    }
    if not blocks:
        return "No single block is to blame; build the store again from its spec."
    writer = StoreWriter(path)
    for split, block in sorted(blocks):
        writer.discard_block(split, block)
    return (
        f"{len(blocks)} damaged block(s) discarded; `kd-cache build SPEC` writes "
        "them again."
    )
