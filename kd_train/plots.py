"""Learning curves and parity plots as PNG bytes; matplotlib is imported when asked."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_train.runs import BASELINE, Cohort
from pipeline.errors import PipelineError

_GREY = "#4d4d4d"
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d")
_STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
_DPI = 150
_MAX_COMPONENTS = 300_000

Array = npt.NDArray[Any]


def curves_png(cohorts: Sequence[Cohort]) -> bytes:
    """Validation force and energy MAE against step, one line per run, log y.

    One row of panels per student; the teacher is a dashed line.
    """
    colors = _colors(cohorts)
    with _style():
        figure = _figure(9.5, 3.0 * len(cohorts) + 0.2)
        grid = figure.subplots(len(cohorts), 2, squeeze=False)
        for cohort, axes in zip(cohorts, grid, strict=True):
            _curve_panel(axes[0], cohort, "forces_mae", "force MAE [meV/Å]", colors)
            _curve_panel(axes[1], cohort, "energy_mae", "energy MAE [meV]", colors)
            # Outside, because lines may run anywhere inside.
            axes[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
        return _png(figure)


def parity_png(cohorts: Sequence[Cohort]) -> bytes:
    """Energy errors and force components against the reference, a column per strategy.

    Energies are shown as errors, because a spread of hundreds of eV between
    compositions would hide errors of meV. The run of the lowest seed is drawn.
    """
    colors = _colors(cohorts)
    n_columns = max(len(cohort.by_strategy()) for cohort in cohorts)
    with _style():
        # Two columns' width at least, so that labels fit on a report of one run.
        size = max(2.3 * n_columns + 0.9, 4.6), 5.8 * len(cohorts) + 0.2
        figure = _figure(*size)
        grid = figure.subplots(2 * len(cohorts), n_columns, squeeze=False)
        for i, cohort in enumerate(cohorts):
            _parity_rows(figure, grid[2 * i : 2 * i + 2], cohort, colors)
        return _png(figure)


def _curve_panel(
    axes: Any, cohort: Cohort, metric: str, label: str, colors: dict[str, str]
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    drawn = False
    for strategy, runs in cohort.by_strategy().items():
        for number, run in enumerate(runs):
            curve = run.curve(f"val_{metric}")
            curve = curve[np.isfinite(curve[:, 1]) & (curve[:, 1] > 0)]
            drawn |= len(curve) > 0
            axes.plot(
                *curve.T,
                color=colors[strategy],
                marker="o" if len(curve) < 3 else None,
                markersize=4,
                linewidth=1.3,
                alpha=0.9,
                label=strategy if number == 0 else None,
            )
    goal = getattr(cohort.teacher, metric, float("nan"))
    if np.isfinite(goal) and goal > 0:
        axes.axhline(goal, color="black", linewidth=1, linestyle="--", label="teacher")
        drawn = True
    axes.set(title=cohort.student, xlabel="step", ylabel=label)
    axes.grid(color="#e6e6e6", linewidth=0.7, which="both")
    if not drawn:
        axes.text(0.5, 0.5, "no values", ha="center", transform=axes.transAxes)
        return
    axes.set_yscale("log")
    # Decades alone label too few lines where a run improves by less than tenfold.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.minorticks_off()


def _parity_rows(
    figure: Any, grid: Array, cohort: Cohort, colors: dict[str, str]
) -> None:
    """Fill the two rows of panels of one student, all panels of a row on one scale."""
    firsts = {name: runs[0] for name, runs in cohort.by_strategy().items()}
    data = {name: run.predictions() for name, run in firsts.items()}
    energy_limit = _limit(
        [1e3 * _energy_error(found) for found in data.values()], 99.0, 1.0
    )
    force_limit = _limit([found["forces_label"] for found in data.values()], 99.9, 0.1)
    for column in range(grid.shape[1]):
        if column >= len(data):
            grid[0, column].remove()
            grid[1, column].remove()
    for column, (name, found) in enumerate(data.items()):
        above, below = grid[0, column], grid[1, column]
        _energy_panel(above, found, energy_limit, colors[name])
        _force_panel(below, found, force_limit, colors[name])
        summary = firsts[name].summary
        above.set_title(f"{cohort.student}, {name}\nseed {summary.seed}")
        _corner(above, f"MAE {summary.metrics.energy_mae:.1f} meV")
        _corner(below, f"MAE {summary.metrics.forces_mae:.1f} meV/Å")
        above.set_xlabel("reference energy [eV/atom]")
        below.set_xlabel("reference force [eV/Å]")
        for axes in (above, below):
            axes.tick_params(labelleft=column == 0)
            axes.set_box_aspect(1)
    grid[0, 0].set_ylabel("energy error [meV]")
    grid[1, 0].set_ylabel("predicted force [eV/Å]")


def _energy_panel(axes: Any, found: dict[str, Array], limit: float, color: str) -> None:
    """Errors in meV; triangles at the edge stand for errors beyond ``limit``."""
    place = found["energy_label"] / found["n_atoms"]
    error = 1e3 * _energy_error(found)
    known = np.isfinite(place) & np.isfinite(error)
    place, error = place[known], error[known]
    inside = np.abs(error) <= limit
    axes.axhline(0, color="black", linewidth=0.7)
    # Thousands of points as vectors or at full strength would be one blob.
    alpha = float(np.clip(150 / max(len(error), 1), 0.12, 0.7))
    points = {"color": color, "linewidths": 0, "alpha": alpha}
    axes.scatter(place[inside], error[inside], s=9, **points)
    for sign, marker in ((1, "^"), (-1, "v")):
        beyond = ~inside & (np.sign(error) == sign)
        edge = np.full(int(beyond.sum()), 0.97 * sign * limit)
        axes.scatter(place[beyond], edge, s=14, marker=marker, **points)
    axes.set_ylim(-limit, limit)
    axes.grid(color="#e6e6e6", linewidth=0.7)


def _force_panel(axes: Any, found: dict[str, Array], limit: float, color: str) -> None:
    """Density of force components on a logarithmic scale, with the diagonal."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_hex, to_rgb

    label, predicted = found["forces_label"], found["forces"]
    inside = (np.abs(label) <= limit) & (np.abs(predicted) <= limit)
    label, predicted = label[inside], predicted[inside]
    if len(label) > _MAX_COMPONENTS:
        some = np.random.default_rng(0).choice(
            len(label), _MAX_COMPONENTS, replace=False
        )
        label, predicted = label[some], predicted[some]
    red, green, blue = (0.3 * part + 0.7 for part in to_rgb(color))
    if len(label):
        axes.hexbin(
            label,
            predicted,
            gridsize=60,
            extent=(-limit, limit, -limit, limit),
            mincnt=1,
            norm=LogNorm(),
            cmap=LinearSegmentedColormap.from_list(
                "tint", [to_hex((red, green, blue)), color]
            ),
            linewidths=0.1,
        )
    axes.plot([-limit, limit], [-limit, limit], color="black", linewidth=0.7)
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit))
    axes.locator_params(nbins=5)


def _energy_error(found: dict[str, Array]) -> Array:
    return np.asarray(found["energy"] - found["energy_label"])


def _limit(parts: list[Array], percentile: float, least: float) -> float:
    """Half width of an axis that shows ``percentile`` of all values, with a margin."""
    values = np.abs(np.concatenate(parts))
    values = values[np.isfinite(values)]
    top = float(np.percentile(values, percentile)) if len(values) else least
    return 1.08 * max(top, least)


def _corner(axes: Any, text: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
    axes.text(0.04, 0.95, text, transform=axes.transAxes, va="top", bbox=box)


def _colors(cohorts: Sequence[Cohort]) -> dict[str, str]:
    """One colour per strategy, the same in all panels; grey for the plain student."""
    names = dict.fromkeys(name for cohort in cohorts for name in cohort.by_strategy())
    others = [name for name in names if name != BASELINE]
    chosen = {name: _PALETTE[i % len(_PALETTE)] for i, name in enumerate(others)}
    return {BASELINE: _GREY, **chosen}


def _figure(width: float, height: float) -> Any:
    """An empty figure of its own canvas: no window, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure((width, height), layout=ConstrainedLayoutEngine(h_pad=0.1))
    FigureCanvasAgg(figure)
    return figure


def _style() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise PipelineError(
            "Plots need matplotlib; install it with `pip install 'kd-train[report]'`."
        ) from None
    return matplotlib.rc_context(_STYLE)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()
