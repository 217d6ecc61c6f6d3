"""Output of ``kd-eval``: one row per split, their mean, predictions."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd_train.evaluation.load_student import STUDENT_FILE
from kd_train.evaluation.metrics import METRICS, STRESS, without_nan
from kd_train.evaluation.score import Score, mean_over
from kd_train.evaluation.throughput import Throughput
from pipeline.files.atomic import write_atomically
from pipeline.models.checkpoint import LoadedModel

_HEADER = ("split", "model", "samples", "E MAE", "F MAE", "F cos", "EFwT")
_UNITS = ("", "", "", "[meV]", "[meV/Å]", "", "[%]")
_STRESS_TITLE, _STRESS_UNIT = "S MAE", "[meV/Å³]"
_DIGITS = {"energy_mae": 1, "forces_mae": 2, "forces_cos": 3, "efwt": 2, STRESS: 2}
MEAN = "mean"
_NONE = "–"


@dataclass(frozen=True)
class Scorecard:
    """Scores of the student at ``place`` on the data source ``data``."""

    student: LoadedModel
    place: Path
    data: dict[str, Any]
    scores: Sequence[Score]
    throughput: Throughput | None = None

    @property
    def mean(self) -> dict[str, float] | None:
        """Plain mean over splits of the student's metrics."""
        return mean_over(score.metrics for score in self.scores)

    @property
    def teacher_mean(self) -> dict[str, float] | None:
        """The same of the teacher, over the splits that it was run on."""
        return mean_over(score.teacher for score in self.scores)

    @property
    def warnings(self) -> list[str]:
        """Reasons to doubt the numbers, one sentence each."""
        return [text for score in self.scores for text in score.warnings]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able form, with None for metrics without labels."""
        throughput = self.throughput
        return {
            "model": _describe(self.student, self.place),
            "data": self.data,
            "splits": {score.name: _numbers(score) for score in self.scores},
            MEAN: {
                "metrics": without_nan(self.mean),
                "teacher_metrics": without_nan(self.teacher_mean),
            },
            "throughput": None if throughput is None else throughput.to_dict(),
            "warnings": self.warnings,
        }

    def to_text(self) -> str:
        """Return a table of all rows, with the mean if there are several splits."""
        rows = []
        for score in self.scores:
            count = len(score.predictions["energy"])
            rows.append(_row(score.name, "student", str(count), score.metrics))
            if score.teacher is not None:
                rows.append(_row("", "teacher", "", score.teacher))
        if len(self.scores) > 1 and self.mean is not None:
            rows.append(_row(MEAN, "student", "", self.mean))
            if self.teacher_mean is not None:
                rows.append(_row("", "teacher", "", self.teacher_mean))
        header: list[tuple[str, ...]] = [_HEADER, _UNITS]
        if any(len(row) > len(_HEADER) for row in rows):
            header = [(*_HEADER, _STRESS_TITLE), (*_UNITS, _STRESS_UNIT)]
            rows = [row + (_NONE,) * (len(header[0]) - len(row)) for row in rows]
        lines = [_align([*header, *rows])]
        if self.throughput is not None:
            lines.append(f"{self.throughput}.")
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Write ``predictions.npz``, then ``metrics.json``, each atomically."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **self._predictions())
        write_atomically(folder / "predictions.npz", buffer.getvalue())
        _write_json(folder / "metrics.json", self.to_dict())

    def _predictions(self) -> dict[str, Any]:
        """Join arrays of all splits, and add ``split`` (S,), each sample's split."""
        arrays: dict[str, Any] = {
            name: np.concatenate([score.predictions[name] for score in self.scores])
            for name in self.scores[0].predictions
            if all(name in score.predictions for score in self.scores)
        }
        counts = [len(score.predictions["energy"]) for score in self.scores]
        names = np.array([score.name for score in self.scores])
        return {**arrays, "split": np.repeat(names, counts)}


def write_throughput(
    throughput: Throughput, data: Mapping[str, Any], run: Path
) -> bool:
    """Write ``throughput.json``, or return False if ``run`` is not a run folder."""
    if not (run / STUDENT_FILE).exists():
        return False
    _write_json(run / "throughput.json", {**throughput.to_dict(), "data": dict(data)})
    return True


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=2, sort_keys=True)
    write_atomically(path, text.encode() + b"\n")


def _describe(student: LoadedModel, place: Path) -> dict[str, Any]:
    """Describe the model, and its training if it comes from one of our runs."""
    config = student.provenance.get("config")
    trained = {}
    if isinstance(config, dict):
        trained = {key: config.get(key) for key in ("strategy", "seed")}
        chosen = config.get("student") or {}
        trained["student"] = chosen.get("preset") or chosen.get("model")
    return {
        "path": str(place),
        "sha256": student.sha256,
        "name": student.name,
        "parameters": sum(p.numel() for p in student.model.parameters()),
        "trained_on": student.provenance.get("fingerprint"),
        **trained,
    }


def _numbers(score: Score) -> dict[str, Any]:
    offset = score.energy_offset
    return {
        "samples": len(score.predictions["energy"]),
        "atoms": int(score.predictions["n_atoms"].sum()),
        "metrics": without_nan(score.metrics),
        "teacher_metrics": without_nan(score.teacher),
        "median_energy_error_per_atom": offset if math.isfinite(offset) else None,
    }


def _row(
    name: str, model: str, count: str, metrics: Mapping[str, float]
) -> tuple[str, ...]:
    names = (*METRICS, *(name for name in (STRESS,) if name in metrics))
    cells = [_cell(metrics[key], _DIGITS[key]) for key in names]
    return (name, model, count, *cells)


def _cell(value: float, digits: int) -> str:
    return _NONE if math.isnan(value) else f"{value:.{digits}f}"


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if k < 2 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
