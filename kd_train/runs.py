"""Finished run folders: reading them, and refusing those that cannot be compared."""

import csv
import io
import json
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, ConfigDict

from kd_train.config import STRATEGIES
from pipeline.documents import ClosedModel, read_yaml, validate
from pipeline.errors import SpecError

BASELINE = "none"
_PREDICTIONS = ("energy", "energy_label", "forces", "forces_label", "n_atoms")
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, NotImplementedError)


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


class Header(_Open):
    """What ``config.yaml`` says: the configuration, and where training started."""

    config: dict[str, Any]
    initial_weights: str


@dataclass(frozen=True)
class FinishedRun:
    """One finished run; curves and predictions are read when asked for."""

    folder: Path
    summary: Summary
    header: Header

    @property
    def is_baseline(self) -> bool:
        """Whether this is the plain student."""
        return self.summary.strategy == BASELINE

    def weights(self) -> str:
        """Distillation weights in force, such as ``n2n=100``; empty for a baseline."""
        known = self.header.config.get("distill", {})
        parts = self.summary.strategy.split("+")
        return ", ".join(f"{name}={known[name]:g}" for name in parts if name in known)

    def curve(self, column: str) -> npt.NDArray[np.float64]:
        """Rows of (step, value of ``column``) at every validation, shape (V, 2)."""
        try:
            with (self.folder / "metrics.csv").open(newline="") as stream:
                rows = [(row["step"], row[column]) for row in csv.DictReader(stream)]
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

    def _damaged(self, name: str) -> SpecError:
        return SpecError(
            f"{self.folder / name} is missing or damaged; write it anew with "
            f"`kd-train --out {self.folder} --resume`."
        )


@dataclass(frozen=True)
class Cohort:
    """All runs of one student: baselines first, then strategies, seeds ascending."""

    student: str
    runs: tuple[FinishedRun, ...]

    @property
    def teacher(self) -> Metrics | None:
        """Metrics of the stored teacher; None where the store has none."""
        return self.runs[0].summary.teacher_metrics

    def by_strategy(self) -> dict[str, list[FinishedRun]]:
        """Runs of every strategy, in the order of the table's rows."""
        found: dict[str, list[FinishedRun]] = {}
        for run in self.runs:
            found.setdefault(run.summary.strategy, []).append(run)
        return found

    def baselines(self) -> dict[int, FinishedRun]:
        """The plain student of every seed."""
        return {run.summary.seed: run for run in self.runs if run.is_baseline}


def read_cohorts(folders: Sequence[Path]) -> list[Cohort]:
    """Runs grouped by student, in the order in which students first appear.

    Raises
    ------
    SpecError
        A folder is unfinished or damaged, or two runs cannot stand in one table.
    """
    if not folders:
        raise SpecError("A report needs at least one run folder.")
    runs = [read_run(folder) for folder in folders]
    _require_one_store(runs)
    students = dict.fromkeys(run.summary.student for run in runs)
    cohorts = []
    for student in students:
        members = [run for run in runs if run.summary.student == student]
        members.sort(key=lambda run: (*_rank(run.summary.strategy), run.summary.seed))
        cohorts.append(Cohort(student, tuple(members)))
        _require_comparable(cohorts[-1])
    return cohorts


def read_run(folder: Path) -> FinishedRun:
    """The run in ``folder``; refuses one that is unfinished or damaged."""
    path = folder / "metrics.json"
    if not (folder / "config.yaml").exists():
        raise SpecError(f"{folder} is not a run folder: it has no config.yaml.")
    if not path.exists():
        raise SpecError(
            f"{folder} is not finished (it has no metrics.json); continue it with "
            f"`kd-train --out {folder} --resume`."
        )
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        document = None
    if not isinstance(document, dict):
        raise SpecError(
            f"{path} is damaged (not a JSON object); write it anew with "
            f"`kd-train --out {folder} --resume`."
        )
    summary = validate(Summary, document, str(path))
    config = folder / "config.yaml"
    return FinishedRun(
        folder, summary, validate(Header, read_yaml(config), str(config))
    )


def differing_settings(cohort: Cohort) -> dict[str, list[str]]:
    """Configuration keys on which the runs disagree, with their values.

    What a comparison varies on purpose is left out: strategy, seed, and the weights of
    terms that a run does not use.
    """
    seen: dict[str, dict[str, None]] = {}
    for run in cohort.runs:
        settings = _flat(run.header.config)
        for key, value in settings.items():
            if key not in ("strategy", "seed") and not key.startswith("distill."):
                seen.setdefault(key, {})[str(value)] = None
        if weights := run.weights():
            key = f"the distillation weights of {run.summary.strategy}"
            seen.setdefault(key, {})[weights] = None
    return {key: list(values) for key, values in seen.items() if len(values) > 1}


def _require_one_store(runs: list[FinishedRun]) -> None:
    first = runs[0]
    for run in runs[1:]:
        if run.summary.fingerprint != first.summary.fingerprint:
            raise SpecError(
                f"{first.folder} and {run.folder} were trained on different stores "
                f"(fingerprints {first.summary.fingerprint[:12]}… and "
                f"{run.summary.fingerprint[:12]}…); report them separately."
            )


def _require_comparable(cohort: Cohort) -> None:
    """Same steps and split, every (strategy, seed) once, one start for every seed."""
    first, baselines = cohort.runs[0], cohort.baselines()
    seen: dict[tuple[str, int], FinishedRun] = {}
    for run in cohort.runs:
        for key in ("steps", "val_split"):
            ours, theirs = getattr(first.summary, key), getattr(run.summary, key)
            if ours != theirs:
                raise SpecError(
                    f"{first.folder} and {run.folder}, both {cohort.student}, have "
                    f"different {key} ({ours} and {theirs}); compare equal ones only."
                )
        name, seed = run.summary.strategy, run.summary.seed
        if (name, seed) in seen:
            raise SpecError(
                f"{seen[name, seed].folder} and {run.folder} are both {cohort.student} "
                f"with strategy {name} and seed {seed}; leave one of them out."
            )
        seen[name, seed] = run
        baseline = baselines.get(seed, run)
        if baseline.header.initial_weights != run.header.initial_weights:
            raise SpecError(
                f"{run.folder} did not start from the weights of its baseline "
                f"{baseline.folder}, though both have seed {seed}; train both with the "
                "same student and the same version."
            )


def _rank(strategy: str) -> tuple[float, int, str]:
    """Single strategies in their documented order, then the joined ones."""
    parts = strategy.split("+")
    place = STRATEGIES.index(parts[0]) if parts[0] in STRATEGIES else math.inf
    return len(parts), int(min(place, len(STRATEGIES))), strategy


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
