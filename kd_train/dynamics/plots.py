"""Plots of ``kd-eval --dynamics``: energies of replicas, radial distributions."""

from typing import Any

from kd_train.dynamics.measure import Measured
from kd_train.dynamics.results import Results
from kd_train.report.figures import GRID, new_figure, render_files, style

# More lines than this have no legend, because colours repeat.
_FEW_REPLICAS = 10
_STUDENT, _REFERENCE = "#d55e00", "#4d4d4d"


def plot_files(results: Results) -> dict[str, bytes]:
    """Draw ``energy`` and ``rdf``, each as PNG and PDF, by the names of files.

    Raises
    ------
    PipelineError
        matplotlib is not installed.
    """
    with style():
        return _energy(results) | _rdf(results)


def _energy(results: Results) -> dict[str, bytes]:
    """Total energy minus its start against time; a cross ends a failed replica."""
    panels = [results.student]
    if results.teacher is not None:
        panels.append(results.teacher)
    figure = new_figure(3.6 * len(panels) + 0.4, 2.8)
    for axes, measured in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        _replica_lines(axes, measured)
    return render_files(figure, "energy")


def _replica_lines(axes: Any, measured: Measured) -> None:
    for replica in measured.replicas:
        total = replica.total(len(measured.atoms))
        axes.plot(replica.time, total, linewidth=0.9, label=f"{replica.number}")
        if replica.reason is not None and len(total):
            color = axes.lines[-1].get_color()
            axes.plot(replica.time[-1:], total[-1:], "x", color=color)
    if 1 < len(measured.replicas) <= _FEW_REPLICAS:
        axes.legend(title="replica", fontsize=7, title_fontsize=7)
    axes.set_title(measured.name)
    axes.set_xlabel("time [ps]")
    axes.set_ylabel("total energy − start [meV/atom]")
    axes.grid(**GRID)


def _rdf(results: Results) -> dict[str, bytes]:
    own, reference = results.student.rdf, results.reference_rdf
    if own is None:
        return {}
    figure = new_figure(4.0, 2.8)
    axes = figure.subplots()
    if reference is not None:
        axes.plot(reference.r, reference.values, color=_REFERENCE, label="reference")
    axes.plot(own.r, own.values, "--", color=_STUDENT, label="student")
    axes.set_xlabel("r [Å]")
    axes.set_ylabel("g(r)" if own.is_g else "share of pairs [1/Å]")
    axes.legend()
    axes.grid(**GRID)
    return render_files(figure, "rdf")
