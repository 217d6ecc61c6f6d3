"""The comparison in sentences, and the commands that its runs came from."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_train.config.recipe import apply_recipe
from kd_train.config.strategy_names import BUILT_IN
from kd_train.config.train_config import TrainConfig
from kd_train.report.grouping import Cohort
from kd_train.report.layouts import format_mean_sd, gap_text
from kd_train.report.runs import (
    FinishedRun,
    SkippedRun,
    flat_defaults,
    flatten_settings,
)
from kd_train.report.tables import COLUMNS, Column, Row, Table
from kd_train.report.teacher_row import teacher_notes
from pipeline.errors import SpecError
from pipeline.spec.plain_yaml import yaml_text
from pipeline.spec.yaml_model import validate

_FLAGS = {
    "strategy": "--strategy",
    "student.preset": "--student",
    "seed": "--seed",
    "steps": "--steps",
}


def summarize(
    table: Table,
    cohorts: Sequence[Cohort],
    missing: Sequence[SkippedRun],
    incomparable: Sequence[SkippedRun],
) -> list[str]:
    """Summarize what was compared, and the best row of every student."""
    runs = [run for cohort in cohorts for run in cohort.runs]
    seeds = {run.summary.seed for run in runs}
    counts = (
        _count(len(runs), "finished run"),
        _count(len(cohorts), "student"),
        _count(len(seeds), "seed"),
    )
    sentences = [
        "{} of {} with {} on one store, ".format(*counts)
        + f"validated on split {table.val_split}."
        if runs
        else "No run is finished."
    ]
    if missing:
        sentences.append(f"{_count(len(missing), 'run')} without results: see below.")
    if incomparable:
        count = _count(len(incomparable), "finished run")
        sentences.append(f"{count} not comparable with the other runs: see below.")
    for cohort in cohorts:
        rows = [row for row in table.rows if row.student == cohort.student]
        if any(row.gaps is not None for row in rows):
            best = "; ".join(_best(rows, column) for column in COLUMNS[:2])
            sentences.append(f"{cohort.student}: {best}.")
    return [*sentences, *teacher_notes(cohorts)]


def training_command(run: FinishedRun) -> str:
    """Return the command that repeats ``run``, or with ``--resume`` continues it.

    It sets every value that is not a default, and every value of the run's recipe, so
    that later changes of the recipe do not change the run.
    """
    words = ["kd-train", "--cache", "STORE"]
    if run.header.processes > 1:
        count = str(run.header.processes)
        words = ["torchrun", "--nproc-per-node", count, "-m", "kd_train", *words[1:]]
    settings, left_out = _split_settings(run)
    for key, flag in _FLAGS.items():
        words += [flag, str(settings[key])] if settings[key] != "" else []
    for key, value in settings.items():
        if key not in _FLAGS and (key not in left_out or left_out[key] != value):
            words += ["--set", f"{key}={_yaml_value(value)}"]
    return shlex.join([*words, "--out", str(run.folder)])


def _split_settings(run: FinishedRun) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of ``run``, and the settings that need no flag."""
    defaults, name = flat_defaults(), run.settings["recipe"]
    bare = {"student": {"preset": run.settings["student.preset"]}, "recipe": name}
    try:
        asked = validate(TrainConfig, bare, str(run.folder))
        recipe = flatten_settings(apply_recipe(asked, None).model_dump(mode="json"))
    except SpecError:  # from a version with other recipes or students
        name, recipe = "none", defaults
    if name in ("auto", "none"):  # from before there were recipes
        return run.settings | {"recipe": "none"}, defaults
    # Weights of the terms depend on the teacher, so none comes about by itself.
    weights = {f"distill.{term}" for term in BUILT_IN}
    alone = {
        key: value
        for key, value in defaults.items()
        if recipe.get(key) == value and key not in weights
    }
    return run.settings, alone


def report_command(
    runs: Sequence[Path], out: Path, *, partial: bool, cka: Sequence[Path]
) -> str:
    """Return the command that makes the report."""
    words = ["kd-report", *map(str, runs), "--out", str(out)]
    words += ["--partial"] if partial else []
    for folder in cka:
        words += ["--cka", str(folder)]
    return shlex.join(words)


def _best(rows: Sequence[Row], column: Column) -> str:
    """Name the row of a student with the best mean of a metric, and its gap."""
    named = [row for row in rows if column.name in row.best]
    if not named:
        return f"{column.title} is the same for all rows or missing"
    row = named[0]
    mean = format_mean_sd(row.values[column.name], column.decimals)
    value = f"{mean} {column.unit}".strip()
    if row.gaps is None:
        return f"no row beats the plain student in {column.title} ({value})"
    gap = gap_text(row, column)
    closed = "" if gap == "–" else f", {gap} % of the gap closed"
    return f"{column.title} is best with {row.label} ({value}{closed})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _yaml_value(value: Any) -> str:
    """Format ``value`` as YAML for ``--set``, with the same value and type."""
    return yaml_text(value, flow=True).removesuffix("\n").removesuffix("\n...")
