"""Learning curves, and accuracy against throughput."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_train.report.documents import ThroughputRecord
from kd_train.report.figures import (
    GRID,
    RowStyle,
    new_figure,
    render_files,
    row_styles,
    style,
)
from kd_train.report.grouping import Cohort, Variant
from kd_train.report.runs import FinishedRun
from kd_train.report.tables import COLUMNS, TEACHER, Column, Spread

_ERRORS = (COLUMNS[1], COLUMNS[0])  # forces first: they judge a potential better
_MARKERS = "os^Dv*"
_RATES = (
    ("samples_per_second_with_graphs", "with graph building"),
    ("samples_per_second", "without graph building"),
)

Array = npt.NDArray[np.float64]


def curves_files(cohorts: Sequence[Cohort]) -> dict[str, bytes]:
    """Draw validation force and energy MAE against step and wall time, log y.

    A line per row of the table with the standard deviation over seeds around it, two
    rows of panels per student; the teacher is a dashed line.
    """
    chosen = row_styles(cohorts)
    with style():
        figure = new_figure(8.2, 4.7 * len(cohorts) + 0.1)
        grid = figure.subplots(
            2 * len(cohorts), 2, squeeze=False, sharey="row", sharex=False
        )
        for i, cohort in enumerate(cohorts):
            _curve_panels(grid[2 * i : 2 * i + 2], cohort, chosen)
        return render_files(figure, "curves")


def mean_curve(runs: Sequence[FinishedRun], column: str) -> Array:
    """Return step, mean seconds, mean and deviation of ``column`` over seeds, (V, 4).

    At the steps at which all runs were validated. A missing value makes the mean
    missing; of one run the deviation is zero.
    """
    curves = [run.curve(column) for run in runs]
    # The last row of a step, should a file have it twice.
    by_step = [{row[0]: row[1:] for row in curve} for curve in curves]
    steps = sorted(set.intersection(*(set(known) for known in by_step)))
    stacked = np.array([[known[step] for step in steps] for known in by_step])
    stacked = stacked.reshape(len(runs), len(steps), 2)
    spread = stacked[:, :, 1].std(axis=0, ddof=1 if len(runs) > 1 else 0)
    means = stacked.mean(axis=0)
    return np.column_stack([steps, means, spread]) if steps else np.empty((0, 4))


def _curve_panels(grid: Any, cohort: Cohort, chosen: dict[str, RowStyle]) -> None:
    """Draw two rows (forces, energies) by two columns (steps, time)."""
    longest = max(
        (run.curve(f"val_{_ERRORS[0].name}")[-1, 1] for run in cohort.runs), default=0.0
    )
    unit, length = _time_unit(float(longest))
    for axes, metric in zip(grid, _ERRORS, strict=True):
        for variant in cohort.variants:
            with np.errstate(invalid="ignore"):
                curve = mean_curve(variant.runs, f"val_{metric.name}")
            curve[~np.isfinite(curve[:, 2]) | (curve[:, 2] <= 0), 2] = np.nan
            _curve(axes[0], curve[:, 0], curve, variant.label, chosen)
            _curve(axes[1], curve[:, 1] / length, curve, variant.label, chosen)
        goal = getattr(cohort.teacher, metric.name, float("nan"))
        for panel in axes:
            _finish_panel(panel, goal)
        axes[0].set_ylabel(f"{metric.title} [{metric.unit}]")
    for panel in grid[0]:
        panel.set_title(cohort.student)
    grid[1, 0].set_xlabel("step")
    grid[1, 1].set_xlabel(f"wall time [{unit}]")
    # Outside, because lines may run anywhere inside.
    handles, labels = grid[0, 0].get_legend_handles_labels()
    grid[0, 1].legend(handles, labels, loc="upper left", bbox_to_anchor=(1.01, 1.02))


def _curve(
    axes: Any, x: Array, curve: Array, label: str, chosen: dict[str, RowStyle]
) -> None:
    row_style, (_, _, mean, spread) = chosen[label], curve.T
    few = np.isfinite(mean).sum() < 3
    axes.plot(
        x,
        mean,
        color=row_style.color,
        linestyle=row_style.line,
        marker="o" if few else None,
        markersize=3.5,
        linewidth=1.3,
        label=label,
    )
    if spread.any():
        # A band that reaches zero would have no lower edge on a logarithmic axis.
        low = np.maximum(mean - spread, 0.2 * mean)
        axes.fill_between(
            x, low, mean + spread, color=row_style.color, alpha=0.15, linewidth=0
        )


def _finish_panel(axes: Any, goal: float) -> None:
    """Draw teacher, grid and a logarithmic axis with enough labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    drawn = any(
        np.isfinite(np.asarray(line.get_ydata(), float)).any() for line in axes.lines
    )
    if np.isfinite(goal) and goal > 0:
        axes.axhline(goal, color="black", linewidth=1, linestyle=(0, (5, 3)))
        axes.lines[-1].set_label(TEACHER)
        drawn = True
    axes.grid(**GRID)
    axes.set_xlim(left=0)
    if not drawn:
        axes.text(0.5, 0.5, "no values", ha="center", transform=axes.transAxes)
        return
    axes.set_yscale("log")
    # Decades alone label too few lines if a run improves by less than tenfold.
    low, high = axes.get_ylim()
    wide = high > 4 * low
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.minorticks_off()


def _time_unit(longest: float) -> tuple[str, float]:
    """Return the unit of a time axis up to ``longest`` seconds, and its seconds."""
    if longest > 3 * 3600:
        return "h", 3600.0
    return ("min", 60.0) if longest > 300 else ("s", 1.0)


@dataclass(frozen=True)
class Point:
    """A row of the table at the rate that was measured on one machine."""

    student: str
    variant: Variant
    measured: tuple[ThroughputRecord, ...]

    @property
    def machine(self) -> str:
        """Device and threads of the measurement."""
        return self.measured[0].machine

    def rate(self, kind: str) -> float:
        """Return the mean samples per second over the measured runs."""
        return float(np.mean([getattr(one, kind) for one in self.measured]))

    def error(self, metric: Column) -> Spread:
        """Return mean and deviation of a metric over all runs of the row."""
        values = [
            getattr(run.summary.metrics, metric.name) for run in self.variant.runs
        ]
        return Spread.of(values)


def throughput_points(cohorts: Sequence[Cohort]) -> list[Point]:
    """List rows with a measured throughput, once per machine."""
    points = []
    for cohort in cohorts:
        for variant in cohort.variants:
            machines: dict[str, list[ThroughputRecord]] = {}
            for run in variant.runs:
                if (found := run.throughput()) is not None:
                    machines.setdefault(found.machine, []).append(found)
            points += [
                Point(cohort.student, variant, tuple(found))
                for found in machines.values()
            ]
    return points


def throughput_caption(points: Sequence[Point]) -> str:
    """Write the caption: measurement, machine, and a warning for several machines."""
    measured = [one for point in points for one in point.measured]
    sizes = sorted({one.batch_size for one in measured})
    atoms = sorted({round(one.mean_atoms, 1) for one in measured})
    text = (
        "Error of exported students against samples per second of inference, with "
        f"graph building (left) and without (right); batch size {_range(sizes)}, "
        f"{_range(atoms)} atoms per sample on average. "
    )
    several = _machines(points)
    if several is None:
        return f"{text}Measured on {measured[0].machine}."
    return (
        f"{text}Measured on different machines ({several}): compare speeds only "
        "between markers of one kind."
    )


def _machines(points: Sequence[Point]) -> str | None:
    """Name the marker of every machine, None if there is one machine."""
    machines = dict.fromkeys(point.machine for point in points)
    names = ("circles", "squares", "triangles", "diamonds", "tips", "stars")
    sentences = [
        f"{names[i % len(names)]}: {machine}" for i, machine in enumerate(machines)
    ]
    return "; ".join(sentences) if len(sentences) > 1 else None


def throughput_files(cohorts: Sequence[Cohort]) -> dict[str, bytes]:
    """Draw force and energy MAE against throughput, if it was measured."""
    points = throughput_points(cohorts)
    if not points:
        return {}
    chosen = row_styles(cohorts)
    with style():
        figure = new_figure(8.2, 5.0)
        grid = figure.subplots(2, 2, sharey="row", sharex="col")
        for axes, metric in zip(grid, _ERRORS, strict=True):
            for panel, (kind, _) in zip(axes, _RATES, strict=True):
                _throughput_panel(panel, points, kind, metric, chosen)
                goal = getattr(cohorts[0].teacher, metric.name, float("nan"))
                _finish_panel(panel, goal)
            axes[0].set_ylabel(f"{metric.title} [{metric.unit}]")
        for panel, (kind, title) in zip(grid[1], _RATES, strict=True):
            panel.set_xlabel(f"samples per second, {title}")
            _rate_axis(panel, [point.rate(kind) for point in points])
        _throughput_legend(grid[0, 1], grid[0, 0])
        if (several := _machines(points)) is not None:
            figure.suptitle(f"different machines: {several}", fontsize=7)
        return render_files(figure, "throughput")


def _throughput_panel(
    axes: Any,
    points: Sequence[Point],
    kind: str,
    metric: Column,
    chosen: dict[str, RowStyle],
) -> None:
    machines = list(dict.fromkeys(point.machine for point in points))
    named: set[str] = set()
    for point in points:
        error, row_style = point.error(metric), chosen[point.variant.label]
        if not np.isfinite(error.mean):
            continue
        axes.errorbar(
            point.rate(kind),
            error.mean,
            yerr=error.deviation if np.isfinite(error.deviation) else None,
            color=row_style.color,
            marker=_MARKERS[machines.index(point.machine) % len(_MARKERS)],
            # Plain students are open, so that they stand out from distilled ones.
            markerfacecolor="white" if point.variant.is_plain else row_style.color,
            markersize=5.5,
            elinewidth=0.9,
            linestyle="none",
            label=point.variant.label,
        )
        if point.student not in named:
            named.add(point.student)
            axes.annotate(
                point.student,
                (point.rate(kind), error.mean),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color="#555555",
            )


def _throughput_legend(axes: Any, labelled: Any) -> None:
    """List every label once, right of ``axes``."""
    handles, labels = labelled.get_legend_handles_labels()
    once = dict(zip(reversed(labels), reversed(handles), strict=True))
    # The teacher is a line, and lines come first.
    names = sorted(dict.fromkeys(labels), key=lambda name: name == TEACHER)
    axes.legend(
        [once[name] for name in names],
        names,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
    )


def _rate_axis(axes: Any, rates: Sequence[float]) -> None:
    """Set limits with space for names; use a logarithmic axis for wide ranges."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, high = min(rates), max(rates)
    if high > 3 * low > 0:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.5, high * 3.0)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.minorticks_off()
    else:
        axes.set_xlim(0, 1.7 * high)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _range(values: Sequence[float]) -> str:
    low, high = values[0], values[-1]
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
