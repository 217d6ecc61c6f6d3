"""Run folders: finished runs, and the state of skipped runs."""

import csv
import io
import json
import shlex
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kd_train.config.strategy_names import BASELINE
from kd_train.config.train_config import TrainConfig
from kd_train.report.documents import (
    BatchSizes,
    Document,
    Failure,
    Header,
    Summary,
    ThroughputRecord,
)
from pipeline.errors import SpecError
from pipeline.spec.yaml_model import read_yaml, validate

_PREDICTIONS = ("energy", "energy_label", "forces", "forces_label", "n_atoms")
_VIRIALS = ("virial", "virial_label", "volume")
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, NotImplementedError)
_LONGEST_REASON = 300


@dataclass(frozen=True)
class FinishedRun:
    """One finished run, which reads curves and predictions on demand.

    ``batch`` is what an optimiser step sees, of all processes: ``128 samples``.
    """

    folder: Path
    summary: Summary
    header: Header
    batch: str

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Configuration with dotted keys, with defaults for keys newer than the run."""
        return flat_defaults() | flatten_settings(self.header.config)

    @property
    def strategies(self) -> tuple[str, ...]:
        """Names of the distillation terms, empty for a baseline."""
        name = self.summary.strategy
        return () if name == BASELINE else tuple(name.split("+"))

    def weight(self, strategy: str) -> Any:
        """Configured weight of a term; None if the run does not have one."""
        plugin = self.settings.get(f"distill.weights.{strategy}")
        return self.settings.get(f"distill.{strategy}", plugin)

    def weights(self) -> str:
        """Distillation weights in force, such as ``n2n=100``; empty for a baseline."""
        known = {name: self.weight(name) for name in self.strategies}
        return ", ".join(
            f"{name}={format_number(value)}" for name, value in known.items()
        )

    def curve(self, column: str) -> npt.NDArray[np.float64]:
        """Read step, seconds and ``column`` at every validation, shape (V, 3)."""
        keys = ("step", "seconds", column)
        try:
            with (self.folder / "metrics.csv").open(newline="") as stream:
                rows = [[row[key] for key in keys] for row in csv.DictReader(stream)]
            curve = np.array(rows, dtype=np.float64)
        except (OSError, TypeError, ValueError, KeyError, csv.Error):
            raise self._damaged("metrics.csv") from None
        if not len(curve):
            raise self._damaged("metrics.csv")
        return curve

    def predictions(self) -> dict[str, npt.NDArray[Any]]:
        """Read energies (S,) in eV, forces of free atoms (3N,) in eV/Å, and n_atoms.

        Names as in ``predictions.npz``: ``energy``, ``energy_label`` and so on.
        """
        try:
            # From memory, since numpy leaves a damaged file open.
            content = io.BytesIO((self.folder / "predictions.npz").read_bytes())
            with np.load(content, allow_pickle=False) as file:
                found = {name: file[name] for name in _PREDICTIONS}
                fixed = file.get("fixed")
                found |= {name: file[name] for name in _VIRIALS if name in file}
        except (OSError, TypeError, ValueError, KeyError, EOFError, *_ZIP_ERRORS):
            raise self._damaged("predictions.npz") from None
        for name in ("forces", "forces_label"):
            rows = found[name] if fixed is None else found[name][fixed == 0]
            found[name] = rows.reshape(-1)
        return found

    def throughput(self) -> ThroughputRecord | None:
        """Read the measurement of ``kd-eval --throughput``, if there is one."""
        path = self.folder / "throughput.json"
        if not path.exists():
            return None
        command = shlex.join(
            ["kd-eval", str(self.folder), "--data", "STORE", "--throughput"]
        )
        again = f"measure it again with `{command}` (STORE is the store)"
        return _json_document(ThroughputRecord, path, again)

    def _damaged(self, name: str) -> SpecError:
        return SpecError(
            f"{self.folder / name} is missing or damaged; write it again with "
            f"{_resume_hint(self.folder)}."
        )


@dataclass(frozen=True)
class SkippedRun:
    """A run that is not in the table: what it was to be, and why it is not there."""

    folder: Path
    description: str
    state: str


def read_runs(
    folders: Sequence[Path], *, partial: bool = False
) -> tuple[list[FinishedRun], list[SkippedRun]]:
    """Read finished runs in ``folders``; with ``partial`` also describe the others.

    Raises
    ------
    SpecError
        There is no folder; without ``partial``: one is unfinished, failed or damaged.
    """
    if not folders:
        raise SpecError("A report needs at least one run folder.")
    finished, others = [], []
    for folder in folders:
        try:
            finished.append(read_run(folder))
        except SpecError as error:
            if not partial:
                raise
            others.append(_skipped_run(folder, str(error)))
    return finished, others


def read_run(folder: Path) -> FinishedRun:
    """Read the run in ``folder``, and refuse unfinished, failed or damaged runs."""
    path = folder / "metrics.json"
    if not path.exists():
        raise SpecError(_describe_unfinished(folder))
    again = f"write it again with {_resume_hint(folder)}"
    summary = _json_document(Summary, path, again)
    header = _read_header(folder)
    settings = flat_defaults() | flatten_settings(header.config)
    sizes = validate(BatchSizes, settings, str(folder / "config.yaml"))
    return FinishedRun(folder, summary, header, sizes.together(header.processes))


def _read_header(folder: Path) -> Header:
    """Read ``config.yaml`` and ``run.json``; the first versions had one file."""
    path = folder / "config.yaml"
    document = read_yaml(path)
    if "config" in document:
        return validate(Header, document, str(path))
    about = _json_map(folder / "run.json", f"start {folder} again")
    return validate(Header, {**about, "config": document}, str(folder / "run.json"))


def flat_defaults() -> dict[str, Any]:
    """Return the default configuration with dotted keys."""
    return flatten_settings(TrainConfig().model_dump(mode="json"))


def format_number(value: object) -> str:
    """Format ``value`` for a label: the shortest form of a number without loss."""
    if not isinstance(value, int | float):
        return str(value)
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _describe_unfinished(folder: Path) -> str:
    failure = folder / "failure.json"
    if not (folder / "config.yaml").exists() and not failure.exists():
        return f"{folder} is not a run folder: it has no config.yaml."
    state = "failed" if failure.exists() else "is not finished (it has no metrics.json)"
    return (
        f"{folder} {state}; continue it with {_resume_hint(folder)}, or add "
        "--partial to list it in the report."
    )


def _resume_hint(folder: Path) -> str:
    """Describe how to continue a run, which needs its original settings."""
    command = ["kd-train", "--cache", "STORE", "--out", str(folder), "--resume"]
    return (
        f"`{shlex.join(command)}` (STORE is the store) and the original settings of "
        "the run"
    )


def _skipped_run(folder: Path, error: str) -> SkippedRun:
    """Describe a folder that :func:`read_run` refused with ``error``."""
    try:
        config = read_yaml(folder / "config.yaml")
        config = config.get("config", config)
        student = config["student"]["preset"] or config["student"]["model"]
        names = student, config["strategy"], config["seed"]
        description = "{}, {}, seed {}".format(*names)
    except (SpecError, KeyError, TypeError, AttributeError):
        description = ""
    if (folder / "metrics.json").exists():
        return SkippedRun(folder, description, f"damaged: {error}")
    if (folder / "failure.json").exists():
        return SkippedRun(folder, description, _failure(folder / "failure.json"))
    if not (folder / "config.yaml").exists():
        return SkippedRun(folder, description, "not started")
    step = _last_step(folder / "metrics.csv")
    moment = "before its first validation" if step is None else f"at step {step}"
    return SkippedRun(folder, description, f"unfinished {moment}")


def _failure(path: Path) -> str:
    try:
        found = _json_document(Failure, path, "run it again")
    except SpecError as error:
        return f"failed: {error}"
    reason = " ".join(found.error.split())
    if len(reason) > _LONGEST_REASON:
        reason = reason[: _LONGEST_REASON - 1] + "…"
    moment = "" if found.step is None else f" at step {found.step}"
    return f"failed{moment}: {reason}"


def _last_step(path: Path) -> int | None:
    """Return the step of the last validation in ``metrics.csv``, if any."""
    try:
        with path.open(newline="") as stream:
            steps = [int(row["step"]) for row in csv.DictReader(stream)]
    except (OSError, TypeError, ValueError, KeyError, csv.Error):
        return None
    return max(steps, default=None)


_Document = TypeVar("_Document", bound=Document)


def _json_document(model: type[_Document], path: Path, remedy: str) -> _Document:
    return validate(model, _json_map(path, remedy), str(path))


def _json_map(path: Path, remedy: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise SpecError(f"{path} is damaged (not a JSON object); {remedy}.")
    return document


def flatten_settings(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``settings`` with dotted keys in place of sections."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= (
            flatten_settings(value, f"{name}.")
            if isinstance(value, dict)
            else {name: value}
        )
    return flat
