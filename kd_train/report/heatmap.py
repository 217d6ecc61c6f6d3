"""CKA files (matrix, description, heat map), written and read for a report."""

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict

from kd_train.evaluation.cka import Similarity
from kd_train.report.figures import new_figure, render_files, style
from pipeline.errors import SpecError
from pipeline.files.atomic import write_atomically
from pipeline.spec.yaml_model import ClosedModel, validate

PNG_START = b"\x89PNG\r\n\x1a\n"
_MOST_NUMBERS = 14


class Description(ClosedModel):
    """Description of a comparison in ``cka.json``, without the matrix."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    first: str
    second: str
    split: str
    samples: int
    atoms: int
    fingerprint: str

    @property
    def caption(self) -> str:
        """The comparison in one sentence."""
        return (
            f"Linear CKA of node features between {self.first} and {self.second} over "
            f"{self.atoms} atoms ({self.samples} samples of split {self.split})."
        )


def write_similarity(found: Similarity, out: Path) -> str:
    """Write cka.csv, cka.json, cka.png and cka.pdf, and return a text table.

    Raises
    ------
    PipelineError
        matplotlib is not installed.
    """
    files = heatmap_files(found)
    about = {key: value for key, value in asdict(found).items() if key != "matrix"}
    files["cka.json"] = json.dumps(about, indent=2, ensure_ascii=False).encode() + b"\n"
    files["cka.csv"] = _csv(found).encode()
    for name, content in files.items():
        write_atomically(out / name, content)
    return _text(found)


def read_similarity(folder: Path) -> tuple[Description, bytes]:
    """Read description and PNG that :func:`write_similarity` wrote to ``folder``.

    Raises
    ------
    SpecError
        A file is missing or damaged.
    """
    try:
        document = json.loads((folder / "cka.json").read_text())
        image = (folder / "cka.png").read_bytes()
    except (OSError, ValueError, RecursionError):
        document, image = None, b""
    if not isinstance(document, dict) or not image.startswith(PNG_START):
        raise SpecError(
            f"{folder} does not contain a complete cka.json and cka.png; write them "
            f"with `kd-cka … --out {folder}`."
        )
    return validate(Description, document, str(folder / "cka.json")), image


def heatmap_files(found: Similarity) -> dict[str, bytes]:
    """Draw the heat map: first model's layers upwards, second model's to the right."""
    rows, columns = found.matrix.shape
    with style():
        size = max(2.8, 1.6 + 0.42 * columns), max(2.2, 1.2 + 0.34 * rows)
        figure = new_figure(*size)
        axes = figure.subplots()
        image = axes.imshow(
            found.matrix, vmin=0, vmax=1, cmap="viridis", origin="lower", aspect="auto"
        )
        turn = 90 if max(map(len, found.second_layers)) > 3 else 0
        axes.set_xticks(range(columns), found.second_layers, rotation=turn)
        axes.set_yticks(range(rows), found.first_layers)
        axes.set(xlabel=found.second, ylabel=found.first)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if max(rows, columns) <= _MOST_NUMBERS:
            _write_numbers(axes, found)
        figure.colorbar(image, ax=axes, label="linear CKA", aspect=25)
        return render_files(figure, "cka")


def _write_numbers(axes: Any, found: Similarity) -> None:
    for (row, column), value in np.ndenumerate(found.matrix):
        text = f"{value:.2f}" if np.isfinite(value) else "–"
        color = "black" if value > 0.6 else "white"
        if not np.isfinite(value):
            color = "black"
        axes.text(
            column, row, text, ha="center", va="center", fontsize=6.5, color=color
        )


def _csv(found: Similarity) -> str:
    """Format the matrix with all digits, empty for constant layers."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["layer", *found.second_layers])
    for layer, values in zip(found.first_layers, found.matrix, strict=True):
        writer.writerow(
            [layer, *(repr(float(v)) if np.isfinite(v) else "" for v in values)]
        )
    return buffer.getvalue()


def _text(found: Similarity) -> str:
    """Format title and matrix with two decimals, first layers at the top."""
    width = max(map(len, found.first_layers))
    columns = [max(len(name), 4) for name in found.second_layers]
    pairs = list(zip(found.second_layers, columns, strict=True))
    lines = [
        f"rows: {found.first}; columns: {found.second}; {found.atoms} atoms",
        " " * width + "".join(f"  {name:>{size}}" for name, size in pairs),
    ]
    for layer, values in zip(found.first_layers, found.matrix, strict=True):
        cells = zip(values, columns, strict=True)
        line = "".join(f"  {value:>{size}.2f}" for value, size in cells)
        lines.append(f"{layer:<{width}}{line}")
    return "\n".join(lines) + "\n"
