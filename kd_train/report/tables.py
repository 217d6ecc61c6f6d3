"""The comparison table: baselines and teacher, then the distilled rows of each pair.

Layout of Tables 1 and 8 of arXiv:2306.14818; how it is written is in ``layouts``.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan

import ase.units

from kd_train.evaluation.metrics import gap_closed
from kd_train.report.basis import MISSING, Basis, find_basis
from kd_train.report.documents import Metrics
from kd_train.report.grouping import Cohort, Variant
from kd_train.report.teacher_row import teacher_notes, train_metrics

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
        """Return whether ``first`` beats ``second``, False if either is NaN."""
        return first < second if self.lower_is_better else first > second


COLUMNS = (
    Column("energy_mae", "energy MAE", "meV", 1, True),
    Column("forces_mae", "force MAE", "meV/Å", 2, True),
    Column("forces_cos", "force cos", "", 3, False),
    Column("efwt", "EFwT", "%", 2, False),
)
STRESS_COLUMN = Column("stress_mae", "stress MAE", "meV/Å³", 2, True)
ALL_COLUMNS = (*COLUMNS, STRESS_COLUMN)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds, NaN if undefined."""

    mean: float
    deviation: float = nan

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Compute the spread of one value per seed, NaN if a value is missing."""
        if not values or not all(isfinite(value) for value in values):
            return cls(nan)
        deviation = statistics.stdev(values) if len(values) > 1 else nan
        return cls(statistics.fmean(values), deviation)

    def parts(self, decimals: int) -> tuple[str, str]:
        """Format mean and deviation: a dash for no mean, nothing for no deviation."""
        if not isfinite(self.mean):
            return MISSING, ""
        deviation = f"{self.deviation:.{decimals}f}" if isfinite(self.deviation) else ""
        # Adding 0.0 turns a rounded -0.0 into 0.0.
        return f"{round(self.mean, decimals) + 0.0:.{decimals}f}", deviation


@dataclass(frozen=True)
class Row:
    """A variant of a student, or the teacher.

    ``label`` names it within its group, ``gaps`` is None if a gap is not defined.
    ``best`` are the metrics on which no row of the same student has a better mean, and
    some have a worse one. ``basis`` is None for the teacher, whose ``split`` is the
    training split in one of its rows.
    """

    label: str
    student: str
    strategy: str
    settings: str
    steps: int | None
    seeds: int
    values: dict[str, Spread]
    gaps: dict[str, Spread] | None = None
    best: frozenset[str] = frozenset()
    basis: Basis | None = None
    split: str = ""


@dataclass(frozen=True)
class Group:
    """Rows under one title: all baselines with the teacher, or one pair."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Table:
    """Groups in order, footnotes in sentences, and gaps if there is a teacher."""

    groups: tuple[Group, ...]
    notes: tuple[str, ...]
    has_gaps: bool
    val_split: str = ""

    @property
    def rows(self) -> tuple[Row, ...]:
        """Rows of all groups."""
        return tuple(row for group in self.groups for row in group.rows)

    @property
    def columns(self) -> tuple[Column, ...]:
        """Metrics that the table shows: that of stress only if a row has it."""
        values = [row.values[STRESS_COLUMN.name].mean for row in self.rows]
        return ALL_COLUMNS if any(map(isfinite, values)) else COLUMNS


def make_table(cohorts: Sequence[Cohort]) -> Table:
    """Make the table: means over seeds, gaps closed against the seed's baseline."""
    if not cohorts:
        return Table((), ("No run is finished.",), has_gaps=False)
    notes: list[str] = []
    first = cohorts[0].runs[0].summary
    teacher = first.teacher or TEACHER
    lengths = {cohort.runs[0].summary.steps for cohort in cohorts}
    equal = f"{lengths.pop()} steps, " if len(lengths) == 1 else ""
    where = f"({equal}split {first.val_split})"
    plain: list[Row] = []
    pairs: list[Group] = []
    for cohort in cohorts:
        baselines, distilled = _rows(cohort, notes, named_steps=not equal)
        plain += baselines
        steps = "" if equal else f" ({cohort.runs[0].summary.steps} steps)"
        if distilled:
            title = f"{teacher} → {cohort.student}{steps}"
            pairs.append(Group(title, tuple(distilled)))
    goal = cohorts[0].teacher
    if goal is not None:
        plain.append(Row(teacher, "", TEACHER, "", None, 0, _values([goal])))
        plain += [_train_row(teacher, *found) for found in train_metrics(cohorts)]
        notes += teacher_notes(cohorts)
    title = f"Baselines and teacher {where}" if goal else f"Baselines {where}"
    groups = (Group(title, tuple(plain)), *pairs) if plain else tuple(pairs)
    general = _general_notes(groups, has_teacher=goal is not None)
    table = Table(groups, (*general, *notes), goal is not None, first.val_split)
    if STRESS_COLUMN not in table.columns:
        return table
    unit = f"1 meV/Å³ is {1e-3 / ase.units.GPa:.4f} GPa."
    return replace(table, notes=(*table.notes, unit))


def _general_notes(groups: Sequence[Group], *, has_teacher: bool) -> list[str]:
    notes = []
    if has_teacher:
        notes.append(
            "Gap closed is the share of the way from the plain student of the same "
            "seed to the teacher. The plain student has reference labels alone."
        )
    else:
        notes.append("The store has no teacher predictions, so the table shows no gap.")
    notes.append(
        "Cost per step is the training time, validations included, divided by that of "
        "the plain student."
    )
    if any(row.seeds > 1 for group in groups for row in group.rows):
        notes.append("± is the standard deviation over seeds.")
    return notes


def _rows(
    cohort: Cohort, notes: list[str], *, named_steps: bool
) -> tuple[list[Row], list[Row]]:
    """Make the baselines and distilled rows of one student.

    What a reader must know of them is added to ``notes``.
    """
    comparable = _comparable_columns(cohort, notes)
    steps = cohort.runs[0].summary.steps
    means = {
        variant.label: _values([run.summary.metrics for run in variant.runs])
        for variant in cohort.variants
    }
    plain: list[Row] = []
    distilled: list[Row] = []
    for variant in cohort.variants:
        gaps = None
        if not variant.is_plain and cohort.teacher is not None:
            gaps = _gaps(cohort, variant, comparable, notes)
        suffix = f"({steps} steps)" if named_steps else ""
        name = f"{cohort.student} {variant.settings} {suffix}"
        row = Row(
            " ".join(name.split()) if variant.is_plain else variant.label,
            cohort.student,
            variant.strategy,
            variant.settings,
            steps,
            len(variant.runs),
            means[variant.label],
            gaps,
            _best_columns(means[variant.label], list(means.values())),
            find_basis(cohort, variant),
        )
        (plain if variant.is_plain else distilled).append(row)
    seeds = {
        tuple(run.summary.seed for run in variant.runs) for variant in cohort.variants
    }
    if len(seeds) > 1:
        notes.append(f"{cohort.student}: the rows have different seeds.")
    return plain, distilled


def _values(metrics: Sequence[Metrics]) -> dict[str, Spread]:
    return {
        c.name: Spread.of([getattr(m, c.name) for m in metrics]) for c in ALL_COLUMNS
    }


def _best_columns(
    own: dict[str, Spread], rows: Sequence[dict[str, Spread]]
) -> frozenset[str]:
    """Return metrics on which no row has a better mean and some have a worse one."""
    best = []
    for column in ALL_COLUMNS:
        mean = own[column.name].mean
        others = [row[column.name].mean for row in rows]
        beaten = any(column.better(mean, other) for other in others)
        if beaten and not any(column.better(other, mean) for other in others):
            best.append(column.name)
    return frozenset(best)


def _comparable_columns(cohort: Cohort, notes: list[str]) -> set[str]:
    """Return metrics on which the teacher beats the baseline of every seed."""
    teacher, baselines = cohort.teacher, cohort.plain
    if teacher is None or len(baselines) == len(cohort.runs):
        return set()
    if not baselines:
        notes.append(f"{_no_baseline(cohort)}, so the table shows no gap.")
        return set()
    found = set()
    for column in ALL_COLUMNS:
        goal = getattr(teacher, column.name)
        plain = [getattr(run.summary.metrics, column.name) for run in baselines]
        if all(column.better(goal, value) for value in plain):
            found.add(column.name)
        elif all(isfinite(value) for value in (goal, *plain)):
            notes.append(
                f"{cohort.student}, {column.title}: the teacher is not better than "
                "the plain student, so the table shows no gap."
            )
    return found


def _no_baseline(cohort: Cohort) -> str:
    """Describe what the gaps of a student without any baseline lack."""
    if any(not run.strategies for run in cohort.runs):
        return (
            f"{cohort.student} has no run with strategy none on splits with reference "
            "labels alone, without pseudo-labels"
        )
    return f"{cohort.student} has no run with strategy none"


def _train_row(teacher: str, split: str, metrics: Metrics) -> Row:
    """Return the row of the teacher's errors on the training split ``split``."""
    label, settings = f"{teacher} on {split}", f"on {split}"
    values = _values([metrics])
    return Row(label, "", TEACHER, settings, None, 0, values, split=split)


def _gaps(
    cohort: Cohort, variant: Variant, comparable: set[str], notes: list[str]
) -> dict[str, Spread]:
    """Compute the gap closed on every metric, over the seeds that have a baseline."""
    pairs = [(cohort.baseline_of(run), run) for run in variant.runs]
    paired = [(plain, run) for plain, run in pairs if plain is not None]
    if cohort.plain and len(paired) < len(pairs):
        rest = (
            "so the gap is a mean over these seeds"
            if paired
            else "so the table shows no gap"
        )
        notes.append(
            f"{cohort.student} {variant.label}: {len(paired)} of {len(pairs)} seeds "
            f"have a baseline with the same settings, {rest}."
        )
    gaps = {}
    for column in ALL_COLUMNS:
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
