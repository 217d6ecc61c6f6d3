"""Parity plots: predictions of exported students against the reference."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

import ase.units
import numpy as np
import numpy.typing as npt

from kd_train.report.figures import (
    GRID,
    RowStyle,
    mix_colors,
    new_figure,
    render_files,
    row_styles,
    style,
)
from kd_train.report.grouping import Cohort, Variant

_COLUMNS = 4
_MAX_COMPONENTS = 300_000
# GPa in one meV/Å³.
GPA = 1e-3 / ase.units.GPa

Array = npt.NDArray[Any]


def parity_files(cohorts: Sequence[Cohort]) -> dict[str, bytes]:
    """Draw energy errors, forces and stresses against the reference, by table row.

    Stresses only if a run has them.

    Energies are shown as errors, because a spread of hundreds of eV between
    compositions would hide errors of meV. The run of the lowest seed is drawn.
    """
    chosen = row_styles(cohorts)
    lines = [len(range(0, len(cohort.variants), _COLUMNS)) for cohort in cohorts]
    n_columns = min(max(len(cohort.variants) for cohort in cohorts), _COLUMNS)
    runs = [variant.runs[0] for cohort in cohorts for variant in cohort.variants]
    height = 3 if any(isfinite(r.summary.metrics.stress_mae) for r in runs) else 2
    with style():
        # Two columns' width at least, so that labels fit on a report of one run.
        size = max(1.95 * n_columns + 0.8, 4.6), 2.3 * height * sum(lines) + 0.2
        figure = new_figure(*size)
        grid = figure.subplots(height * sum(lines), n_columns, squeeze=False)
        for cohort, count in zip(cohorts, lines, strict=True):
            panels, grid = grid[: height * count], grid[height * count :]
            _parity_rows(panels, height, cohort, chosen)
        return render_files(figure, "parity")


def _parity_rows(
    grid: Array, height: int, cohort: Cohort, chosen: dict[str, RowStyle]
) -> None:
    """Fill the panels of one student, each quantity on one scale, ``height`` a row."""
    data = {v.label: v.runs[0].predictions() for v in cohort.variants}
    energy_limit = _limit(
        [1e3 * _energy_error(found) for found in data.values()], 99.0, 1.0
    )
    force_limit = _limit([found["forces_label"] for found in data.values()], 99.9, 0.1)
    stresses = {label: _stresses(found) for label, found in data.items()}
    stress_limit = _limit([label for label, _ in stresses.values()], 99.9, 1.0)
    width = grid.shape[1]
    for i in range(width * (len(grid) // height)):
        line, column = height * (i // width), i % width
        panels = tuple(grid[line : line + height, column])
        if i >= len(cohort.variants):
            for axes in panels:
                axes.remove()
            continue
        variant = cohort.variants[i]
        found, color = data[variant.label], chosen[variant.label].strategy_color
        _energy_panel(panels[0], found, energy_limit, color)
        forces = found["forces_label"], found["forces"]
        _density_panel(panels[1], *forces, force_limit, color)
        if height == 3:
            _density_panel(panels[2], *stresses[variant.label], stress_limit, color)
        _describe(panels, cohort.student, variant, first=column == 0)


def _describe(
    panels: tuple[Any, ...], student: str, variant: Variant, *, first: bool
) -> None:
    """Write titles, labels and errors of the panels of energies, forces, stresses."""
    above, below = panels[:2]
    summary = variant.runs[0].summary
    above.set_title(f"{student}\n{variant.label}, seed {summary.seed}")
    _corner(above, f"MAE {summary.metrics.energy_mae:.1f} meV")
    _corner(below, f"MAE {summary.metrics.forces_mae:.1f} meV/Å")
    above.set_xlabel("reference energy [eV/atom]")
    below.set_xlabel("reference force [eV/Å]")
    if first:
        above.set_ylabel("energy error [meV]")
        below.set_ylabel("predicted force [eV/Å]")
    if len(panels) == 3:
        error = summary.metrics.stress_mae
        _corner(panels[2], f"MAE {error:.2f} meV/Å³\n({GPA * error:.3f} GPa)")
        panels[2].set_xlabel("reference stress [meV/Å³]")
        if first:
            panels[2].set_ylabel("predicted stress [meV/Å³]")
    for axes in panels:
        axes.tick_params(labelleft=first)
        axes.set_box_aspect(1)


def _energy_panel(axes: Any, found: dict[str, Array], limit: float, color: str) -> None:
    """Draw errors in meV, with triangles at the edge for errors beyond ``limit``."""
    per_atom = found["energy_label"] / found["n_atoms"]
    error = 1e3 * _energy_error(found)
    known = np.isfinite(per_atom) & np.isfinite(error)
    per_atom, error = per_atom[known], error[known]
    inside = np.abs(error) <= limit
    axes.axhline(0, color="black", linewidth=0.7)
    # Thousands of points at full strength would be one blob, as vectors a huge file.
    alpha = float(np.clip(150 / max(len(error), 1), 0.12, 0.7))
    points = {"color": color, "linewidths": 0, "alpha": alpha, "rasterized": True}
    axes.scatter(per_atom[inside], error[inside], s=9, **points)
    for sign, marker in ((1, "^"), (-1, "v")):
        beyond = ~inside & (np.sign(error) == sign)
        edge = np.full(int(beyond.sum()), 0.97 * sign * limit)
        axes.scatter(per_atom[beyond], edge, s=14, marker=marker, **points)
    axes.set_ylim(-limit, limit)
    axes.grid(**GRID)


def _density_panel(
    axes: Any, label: Array, predicted: Array, limit: float, color: str
) -> None:
    """Draw the density of components, logarithmic, with the diagonal."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    inside = (np.abs(label) <= limit) & (np.abs(predicted) <= limit)
    label, predicted = label[inside], predicted[inside]
    if len(label) > _MAX_COMPONENTS:
        some = np.random.default_rng(0).choice(
            len(label), _MAX_COMPONENTS, replace=False
        )
        label, predicted = label[some], predicted[some]
    if len(label):
        axes.hexbin(
            label,
            predicted,
            gridsize=60,
            extent=(-limit, limit, -limit, limit),
            mincnt=1,
            norm=LogNorm(),
            cmap=LinearSegmentedColormap.from_list(
                "tint", [mix_colors(color, "#ffffff", 0.7), color]
            ),
            linewidths=0.1,
        )
    axes.plot([-limit, limit], [-limit, limit], color="black", linewidth=0.7)
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit))
    axes.locator_params(nbins=5)


def _stresses(found: dict[str, Array]) -> tuple[Array, Array]:
    """Components of reference and prediction in meV/Å³, of samples that have both."""
    if "volume" not in found:
        return np.zeros(0), np.zeros(0)
    known = np.isfinite(found["virial_label"] + found["virial"]).all(axis=(1, 2))
    known &= found["volume"] > 0
    rows, columns = np.triu_indices(3)
    factor = -1e3 / found["volume"][known, None]
    label, predicted = (
        (found[name][known][:, rows, columns] * factor).reshape(-1)
        for name in ("virial_label", "virial")
    )
    return label, predicted


def _energy_error(found: dict[str, Array]) -> Array:
    return np.asarray(found["energy"] - found["energy_label"])


def _limit(parts: list[Array], percentile: float, least: float) -> float:
    """Return the half width of an axis that shows ``percentile`` of all values."""
    values = np.abs(np.concatenate(parts))
    values = values[np.isfinite(values)]
    top = float(np.percentile(values, percentile)) if len(values) else least
    return 1.08 * max(top, least)


def _corner(axes: Any, text: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
    axes.text(0.04, 0.95, text, transform=axes.transAxes, va="top", bbox=box)
