"""The comparison table: one row per strategy, gap closed per seed, as text and CSV."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import isfinite, nan

from kd_train.metrics import gap_closed
from kd_train.runs import Cohort, FinishedRun, Metrics, differing_settings

MISSING = "–"
TEACHER = "teacher"


@dataclass(frozen=True)
class Column:
    """How a metric is named, rounded and judged."""

    name: str
    title: str
    unit: str
    decimals: int
    lower_is_better: bool

    def better(self, first: float, second: float) -> bool:
        """Whether ``first`` beats ``second``; False if either is NaN."""
        return first < second if self.lower_is_better else first > second


COLUMNS = (
    Column("energy_mae", "energy MAE", "meV", 1, True),
    Column("forces_mae", "force MAE", "meV/Å", 2, True),
    Column("forces_cos", "force cos", "", 3, False),
    Column("efwt", "EFwT", "%", 2, False),
)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; NaN where undefined."""

    mean: float
    deviation: float = nan

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of one value per seed; one missing value makes the mean missing too."""
        if not values or not all(isfinite(value) for value in values):
            return cls(nan)
        deviation = statistics.stdev(values) if len(values) > 1 else nan
        return cls(statistics.fmean(values), deviation)

    def parts(self, decimals: int) -> tuple[str, str]:
        """Rounded mean and deviation; a dash for no mean, nothing for no deviation."""
        if not isfinite(self.mean):
            return MISSING, ""
        deviation = f"{self.deviation:.{decimals}f}" if isfinite(self.deviation) else ""
        # Adding 0.0 turns a rounded -0.0 into 0.0.
        return f"{round(self.mean, decimals) + 0.0:.{decimals}f}", deviation


@dataclass(frozen=True)
class Row:
    """One strategy, or the teacher; ``gaps`` is None where a gap has no sense."""

    label: str
    seeds: int
    values: dict[str, Spread]
    gaps: dict[str, Spread] | None = None


@dataclass(frozen=True)
class Group:
    """The rows of one student."""

    student: str
    steps: int
    val_split: str
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """Student, length of training and split, on one line."""
        return f"{self.student} ({self.steps} steps, split {self.val_split})"

    def best(self, column: Column) -> str | None:
        """Label of the best student on a metric; None if no student has a value."""
        known = {r.label: r.values[column.name].mean for r in self.rows if r.seeds}
        known = {label: mean for label, mean in known.items() if isfinite(mean)}
        pick = min if column.lower_is_better else max
        return pick(known, key=lambda label: known[label]) if known else None


@dataclass(frozen=True)
class Table:
    """Groups in order, footnotes in full sentences; gaps only where a teacher is."""

    groups: tuple[Group, ...]
    notes: tuple[str, ...]
    has_gaps: bool


def make_table(cohorts: Sequence[Cohort]) -> Table:
    """Means over seeds, and gaps closed against the baseline of the same seed."""
    notes: list[str] = []
    has_gaps = any(cohort.teacher is not None for cohort in cohorts)
    groups = tuple(_group(cohort, notes) for cohort in cohorts)
    if any(row.seeds > 1 for group in groups for row in group.rows):
        notes.insert(0, "± is the standard deviation over seeds.")
    if has_gaps:
        notes.insert(
            0,
            "Gap closed is the share of the way from the plain student (none) of the "
            "same seed to the teacher.",
        )
    else:
        notes.append("The store holds no teacher predictions, so no gap is given.")
    return Table(groups, tuple(notes), has_gaps)


def text_table(table: Table) -> str:
    """The table for a terminal: aligned columns, then the footnotes."""
    rows = [row for group in table.groups for row in group.rows]
    columns = [["", "  strategy", *(f"  {row.label}" for row in rows)]]
    columns.append(["", "seeds", *map(_seeds, rows)])
    for column in COLUMNS:
        unit = f"[{column.unit}]" if column.unit else ""
        values = [row.values[column.name] for row in rows]
        columns.append([column.title, unit, *_aligned(values, column.decimals)])
        if table.has_gaps:
            gaps = [row.gaps[column.name] if row.gaps else None for row in rows]
            columns.append(["gap closed", "[%]", *_aligned(gaps, 1)])
    columns = [_padded(texts, left=i == 0) for i, texts in enumerate(columns)]
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    rule = "-" * max(map(len, lines))
    body = iter(lines[2:])
    text = lines[:2]
    for group in table.groups:
        text += [rule, group.title, *(next(body) for _ in group.rows)]
    return "\n".join([*text, rule, *table.notes]) + "\n"


def csv_table(table: Table) -> str:
    """The table with all digits, one line per row; empty where there is no value."""
    buffer = io.StringIO()
    header = ["student", "strategy", "seeds", "steps", "val_split"]
    for column in COLUMNS:
        header += [column.name, f"{column.name}_sd"]
        if table.has_gaps:
            header += [f"{column.name}_gap_closed", f"{column.name}_gap_closed_sd"]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for group in table.groups:
        for row in group.rows:
            cells = [
                group.student,
                row.label,
                _seeds(row),
                group.steps,
                group.val_split,
            ]
            for column in COLUMNS:
                cells += _digits(row.values[column.name])
                if table.has_gaps:
                    cells += _digits(row.gaps[column.name] if row.gaps else Spread(nan))
            writer.writerow(cells)
    return buffer.getvalue()


def _group(cohort: Cohort, notes: list[str]) -> Group:
    """Rows of one student; what a reader must know of them is added to ``notes``."""
    summary = cohort.runs[0].summary
    comparable = _comparable_columns(cohort, notes)
    rows = []
    for label, runs in cohort.by_strategy().items():
        gaps = None
        if label != "none" and cohort.teacher is not None:
            gaps = _gaps(cohort, runs, comparable, notes)
        rows.append(
            Row(label, len(runs), _values([r.summary.metrics for r in runs]), gaps)
        )
    if cohort.teacher is not None:
        rows.append(Row(TEACHER, 0, _values([cohort.teacher])))
    for key, values in differing_settings(cohort).items():
        notes.append(f"{cohort.student}: runs differ in {key} ({'; '.join(values)}).")
    return Group(cohort.student, summary.steps, summary.val_split, tuple(rows))


def _values(metrics: Sequence[Metrics]) -> dict[str, Spread]:
    return {c.name: Spread.of([getattr(m, c.name) for m in metrics]) for c in COLUMNS}


def _comparable_columns(cohort: Cohort, notes: list[str]) -> set[str]:
    """Metrics on which the teacher beats the baseline of every seed."""
    teacher, baselines = cohort.teacher, list(cohort.baselines().values())
    distilled = len(baselines) < len(cohort.runs)
    if teacher is None or not distilled:
        return set()
    if not baselines:
        notes.append(
            f"{cohort.student} has no run with strategy none: no gap is given."
        )
        return set()
    found = set()
    for column in COLUMNS:
        goal = getattr(teacher, column.name)
        plain = [getattr(run.summary.metrics, column.name) for run in baselines]
        if all(column.better(goal, value) for value in plain):
            found.add(column.name)
        elif all(isfinite(value) for value in (goal, *plain)):
            notes.append(
                f"{cohort.student}, {column.title}: the teacher is not better than the "
                "plain student, so no gap is given."
            )
    return found


def _gaps(
    cohort: Cohort, runs: list[FinishedRun], comparable: set[str], notes: list[str]
) -> dict[str, Spread]:
    """Gap closed on every metric, over the seeds that have a baseline."""
    baselines = cohort.baselines()
    pairs = [(baselines.get(run.summary.seed), run) for run in runs]
    paired = [(plain, run) for plain, run in pairs if plain is not None]
    if baselines and len(paired) < len(runs):
        notes.append(
            f"{cohort.student} {runs[0].summary.strategy}: {len(paired)} of "
            f"{len(runs)} seeds have a baseline, the gap is over those."
        )
    gaps = {}
    for column in COLUMNS:
        values = [
            gap_closed(
                getattr(plain.summary.metrics, column.name),
                getattr(run.summary.metrics, column.name),
                getattr(cohort.teacher, column.name),
            )
            for plain, run in paired
            if column.name in comparable
        ]
        gaps[column.name] = Spread.of(values)
    return gaps


def _aligned(spreads: Sequence[Spread | None], decimals: int) -> list[str]:
    """Texts of one width with the signs ± below each other; None gives blanks."""
    parts = [("", "") if s is None else s.parts(decimals) for s in spreads]
    means = max(len(mean) for mean, _ in parts)
    deviations = max(len(deviation) for _, deviation in parts)
    tails = [f" ± {d:>{deviations}}" if d else "" for _, d in parts]
    width = deviations + 3 if deviations else 0
    return [f"{m:>{means}}{t:<{width}}" for (m, _), t in zip(parts, tails, strict=True)]


def _padded(texts: list[str], *, left: bool) -> list[str]:
    width = max(map(len, texts))
    return [text.ljust(width) if left else text.rjust(width) for text in texts]


def _seeds(row: Row) -> str:
    return str(row.seeds) if row.seeds else ""


def _digits(spread: Spread) -> list[str]:
    pair = (getattr(spread, field.name) for field in fields(spread))
    return [repr(value) if isfinite(value) else "" for value in pair]
