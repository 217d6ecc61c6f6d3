"""Run folders: reading finished ones, and saying what became of the others."""

import csv
import io
import json
import math
import shlex
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, ConfigDict, field_validator
from pydantic import Field as Key

from kd_train.config.train_config import BASELINE, TrainConfig, saved_settings
from pipeline.errors import SpecError
from pipeline.spec.yaml_model import ClosedModel, read_yaml, validate

_PREDICTIONS = ("energy", "energy_label", "forces", "forces_label", "n_atoms")
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, NotImplementedError)
_LONGEST_REASON = 300


class _Open(ClosedModel):
    """Part of a run folder's documents; keys that a report does not need may follow."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=True)


Metric = Annotated[float, BeforeValidator(lambda x: math.nan if x is None else x)]


class Metrics(_Open):
    """meV, meV/Å, cosine, %; NaN where the split has no such labels."""

    energy_mae: Metric
    forces_mae: Metric
    forces_cos: Metric
    efwt: Metric


class Summary(_Open):
    """What ``metrics.json`` says of a finished run."""

    student: str
    strategy: str
    seed: int
    steps: int
    seconds: float
    parameters: int
    fingerprint: str
    val_split: str
    metrics: Metrics
    teacher_metrics: Metrics | None
    teacher: str | None = None


class Header(_Open):
    """What ``config.yaml`` says: the configuration, and where training started.

    ``processes`` trained together; folders of before there could be several do not say.
    """

    config: dict[str, Any]
    initial_weights: str
    processes: int = Key(1, ge=1)
    versions: dict[str, str] = Key(default_factory=dict)

    @field_validator("config")
    @classmethod
    def _by_todays_names(cls, config: dict[str, Any]) -> dict[str, Any]:
        return saved_settings(config, "config")


class BatchSizes(_Open):
    """Settings that decide how much an optimiser step sees."""

    batch_size: int
    batch_atoms: int | None
    accumulate_steps: int

    def together(self, processes: int) -> str:
        """All batches of a step, of all processes, as ``128 samples``."""
        atoms = self.batch_atoms
        size = self.batch_size if atoms is None else atoms
        total = size * self.accumulate_steps * processes
        return f"{total} {'samples' if atoms is None else 'atoms'}"


class ThroughputRecord(_Open):
    """What ``throughput.json`` says: samples per second of inference, and on what.

    ``samples_per_second_with_graphs`` includes making the graphs. ``mean_atoms`` is
    that of the samples measured.
    """

    samples_per_second: float
    samples_per_second_with_graphs: float
    batch_size: int
    device: str
    threads: int | None
    mean_atoms: float
    device_name: str | None = None

    @property
    def machine(self) -> str:
        """Device and threads in words."""
        name = self.device_name or self.device
        if self.threads is None:
            return name
        return f"{name}, {self.threads} thread{'s' if self.threads > 1 else ''}"


class Failure(_Open):
    """What ``failure.json`` says of a run that ended with an error."""

    error: str
    step: int | None = None


@dataclass(frozen=True)
class FinishedRun:
    """One finished run; curves and predictions are read when asked for.

    ``batch`` is what an optimiser step sees, of all processes: ``128 samples``.
    """

    folder: Path
    summary: Summary
    header: Header
    batch: str

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Configuration with dotted keys; defaults where the run knew no such key."""
        return flat_defaults() | flatten_settings(self.header.config)

    @property
    def strategies(self) -> tuple[str, ...]:
        """Names of the distillation terms; empty for a baseline."""
        name = self.summary.strategy
        return () if name == BASELINE else tuple(name.split("+"))

    def weights(self) -> str:
        """Distillation weights in force, such as ``n2n=100``; empty for a baseline."""
        known = {name: self.settings.get(f"distill.{name}") for name in self.strategies}
        return ", ".join(
            f"{name}={format_number(value)}" for name, value in known.items()
        )

    def curve(self, column: str) -> npt.NDArray[np.float64]:
        """Step, seconds and ``column`` at every validation, shape (V, 3)."""
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
        """Energies (S,) in eV, force components (3N,) in eV/Å of free atoms, n_atoms.

        Names as in ``predictions.npz``: ``energy``, ``energy_label`` and so on.
        """
        try:
            # From memory, since numpy leaves a damaged file open.
            content = io.BytesIO((self.folder / "predictions.npz").read_bytes())
            with np.load(content, allow_pickle=False) as file:
                found = {name: file[name] for name in _PREDICTIONS}
                fixed = file.get("fixed")
        except (OSError, TypeError, ValueError, KeyError, EOFError, *_ZIP_ERRORS):
            raise self._damaged("predictions.npz") from None
        for name in ("forces", "forces_label"):
            rows = found[name] if fixed is None else found[name][fixed == 0]
            found[name] = rows.reshape(-1)
        return found

    def throughput(self) -> ThroughputRecord | None:
        """What ``kd-eval --throughput`` measured of the exported student, if it did."""
        path = self.folder / "throughput.json"
        if not path.exists():
            return None
        command = shlex.join(
            ["kd-eval", str(self.folder), "--data", "STORE", "--throughput"]
        )
        again = f"measure it anew with `{command}` (STORE is the store)"
        return _json_document(ThroughputRecord, path, again)

    def _damaged(self, name: str) -> SpecError:
        return SpecError(
            f"{self.folder / name} is missing or damaged; write it anew with "
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
    """Finished runs in ``folders``; with ``partial`` also what became of the others.

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
    """The run in ``folder``; refuses one that is unfinished, failed or damaged."""
    path = folder / "metrics.json"
    if not path.exists():
        raise SpecError(_describe_unfinished(folder))
    again = f"write it anew with {_resume_hint(folder)}"
    summary = _json_document(Summary, path, again)
    config = folder / "config.yaml"
    header = validate(Header, read_yaml(config), str(config))
    settings = flat_defaults() | flatten_settings(header.config)
    sizes = validate(BatchSizes, settings, str(config))
    return FinishedRun(folder, summary, header, sizes.together(header.processes))


def flat_defaults() -> dict[str, Any]:
    """The default configuration with dotted keys."""
    return flatten_settings(TrainConfig().model_dump(mode="json"))


def format_number(value: object) -> str:
    """``value`` for a label: shortest form of a number that loses no digit."""
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
    """How to go on with a run, in words; its settings must be those of before."""
    command = ["kd-train", "--cache", "STORE", "--out", str(folder), "--resume"]
    return (
        f"`{shlex.join(command)}` (STORE is the store) and the settings that it was "
        "started with"
    )


def _skipped_run(folder: Path, error: str) -> SkippedRun:
    """What a report says of a folder that :func:`read_run` refused with ``error``."""
    try:
        config = read_yaml(folder / "config.yaml").get("config", {})
        names = config["student"]["preset"], config["strategy"], config["seed"]
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
    """Step of the last validation that ``metrics.csv`` tells of, if any."""
    try:
        with path.open(newline="") as stream:
            steps = [int(row["step"]) for row in csv.DictReader(stream)]
    except (OSError, TypeError, ValueError, KeyError, csv.Error):
        return None
    return max(steps, default=None)


_Document = TypeVar("_Document", bound=_Open)


def _json_document(model: type[_Document], path: Path, remedy: str) -> _Document:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise SpecError(f"{path} is damaged (not a JSON object); {remedy}.")
    return validate(model, document, str(path))


def flatten_settings(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``settings`` with dotted keys in place of sections."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= (
            flatten_settings(value, f"{name}.")
            if isinstance(value, dict)
            else {name: value}
        )
    return flat
