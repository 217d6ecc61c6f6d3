"""Text of what `kd-cache info`, `plan` and `build` print of a store."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.store.describe import describe_contents

_TABLE = (
    *("split", "samples", "atoms", "blocks", "field", "shape", "dtype", "profile"),
    *("bytes per sample", "bytes", "relative squared error"),
)
_COUNTED = {"sample": "samples", "node": "atoms", "edge": "edges"}
_USES = {
    "labels": "labels and features",
    "generation": "generation",
    "force_jacobian": "force_jacobian",
}
_COUNTS = ("frames", "energy", "forces", "virial")
_COLUMNS = ("periodic", "elements", "left out")


def render_description(description: dict[str, Any]) -> str:
    """The description as text for a terminal."""
    state = "complete, sealed" if description["complete"] else "NOT complete"
    lines = [
        f"{description['path']}  (format {description['format_version']}, {state})",
        f"fingerprint  {description['fingerprint']}",
        *_teacher_lines(description["teacher"]),
        *_error_lines(description["teacher_errors"]),
        "codec        bytes+crc32c (default)",
    ]
    for split, found in description["preview"].items():
        errors = found.get("precision_error", {})
        text = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        lines += [f"error        of reduced precision, {split}: {text}"] if text else []
    for name, split in description["splits"].items():
        lines += ["", *_split_lines(name, split)]
    checked = checked_lines(description)
    lines += ["", *checked] if checked else []
    if description["teacher_warning"] is not None:
        lines += ["", description["teacher_warning"]]
    lines += ["", *description["advice"]] if description["advice"] else []
    return "\n".join(lines)


def render_contents(path: Path | str) -> str:
    """Return what planning found in the data of the store at ``path``, as a table."""
    return "\n".join(checked_lines(describe_contents(path)))


def checked_lines(description: Mapping[str, Any]) -> list[str]:
    """What planning found: a table of the splits, forces against the teacher's.

    Stores of older versions have the number of bad samples alone.
    """
    left_out = description["left_out"]
    if description["contents"]:
        lines = contents_table(description["contents"], left_out)
    else:
        lines = [f"{n} samples of split {s} were skipped" for s, n in left_out.items()]
    for split, found in description["preview"].items():
        forces = found.get("forces")
        if forces is not None:
            lines.append(
                f"forces of the labels against the teacher's, {forces['samples']} "
                f"samples of {split}: cosine {forces['cosine']:.2f}, RMS ratio "
                f"{forces['rms_ratio']:.3g}"
            )
    for split, passes in description["teacher_passes"].items():
        used = [f"{n} for {_USES[use]}" for use, n in passes.items() if n]
        if used:
            lines.append(f"teacher passes of {split}: {', '.join(used)}")
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


def _error_lines(errors: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Format the errors of the teacher against the labels, a line for each split."""
    lines = []
    for split, found in errors.items():
        parts = [
            f"{name} {found[key]:.1f} {unit}"
            for key, name, unit in (
                ("energy_mae", "energy MAE", "meV"),
                ("forces_mae", "force MAE", "meV/Å"),
            )
            if found[key] is not None
        ]
        text = f"{', '.join(parts)} ({found['samples']} samples)"
        lines.append(f"error        of the teacher, {split}: {text}")
    return lines


def _split_lines(name: str, split: dict[str, Any]) -> list[str]:
    counted = ", ".join(f"{split[k]} {k}" for k in _COUNTED.values() if k in split)
    done = f"{split['blocks_done']} of {split['blocks']} blocks"
    lines = [f"split {name}: {counted}, {done}{_format_labels(split)}"]
    for path, field in split["fields"].items():
        shape = "(" + ", ".join(str(size) for size in field["shape"]) + ")"
        size, error = field["bytes_per_sample"], field["relative_squared_error"]
        text = "" if field["profile"] == "faithful" else f"  {field['profile']}"
        text += "" if error is None else f", relative squared error {error:.2e}"
        text += "" if "blosc" not in field["codec"] else f", {field['codec']}"
        lines.append(
            f"  {path:32} {shape:16} {field['dtype']:8} {size:10.1f} B/sample{text}"
        )
    total = sum(field["bytes_per_sample"] for field in split["fields"].values())
    return [*lines, f"  {'':58}{total:10.1f} B/sample in total"]


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


def _format_labels(split: dict[str, Any]) -> str:
    known = split["labelled"]
    if known is None:
        return ""
    if not any(known.values()):
        return "; the source has no labels"
    text = f"; {known['energy']} samples have energies, {known['forces']} have forces"
    virials = known.get("virial", 0)
    return f"{text}, {virials} have virials" if virials else text


def contents_table(
    contents: Mapping[str, Mapping[str, Any]], left_out: Mapping[str, int]
) -> list[str]:
    """Lines of a table with a row for each split, of contents as `to_dict` gives."""
    shown = [key for key in _COUNTS if any(key in found for found in contents.values())]
    rows: list[tuple[str, ...]] = [("split", *shown, *_COLUMNS)]
    for name, found in contents.items():
        counts = [str(found.get(key, 0)) for key in shown]
        elements = " ".join(found["elements"])
        rows.append(
            (name, *counts, _periodic(found), elements, str(left_out.get(name, 0)))
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if 0 < place <= len(shown) else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _periodic(found: Mapping[str, Any]) -> str:
    if found["periodic"] in (0, found["frames"]):
        return "all" if found["periodic"] else "none"
    return f"{found['periodic']} of {found['frames']}"
