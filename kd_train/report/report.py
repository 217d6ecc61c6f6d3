"""``kd-report``: finished runs as tables, figures and one web page."""

from collections.abc import Sequence
from pathlib import Path

from kd_train.report.comparable import comparable
from kd_train.report.grouping import Cohort, make_cohorts
from kd_train.report.heatmap import read_similarity
from kd_train.report.layouts import csv_table, latex_bases, latex_table, text_table
from kd_train.report.page import (
    NOT_COMPARABLE,
    WITHOUT_RESULTS,
    Figure,
    PageContent,
    page,
)
from kd_train.report.parity import parity_files
from kd_train.report.plots import (
    curves_files,
    throughput_caption,
    throughput_files,
    throughput_points,
)
from kd_train.report.runs import SkippedRun, read_runs
from kd_train.report.summary import report_command, summarize
from kd_train.report.tables import make_table
from pipeline.files.atomic import hold_lock, write_atomically

_FIGURES = {
    "curves": (
        "Learning curves",
        "Validation errors of averaged weights during training, against optimiser "
        "steps and against wall time, which includes validation. Lines are means "
        "over seeds, bands are standard deviations.",
    ),
    "throughput": ("Accuracy against throughput", ""),
    "parity": (
        "Parity",
        "Predictions of the exported student of the lowest seed on the validation "
        "split. Top: energy error against reference energy per atom; triangles mark "
        "points beyond the edge. Bottom: force components, coloured by the logarithm "
        "of their number.",
    ),
}


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    partial: bool = False,
    cka: Sequence[Path] = (),
) -> str:
    """Compare finished runs in ``out`` and return the table for a terminal.

    Writes table.txt, table.csv, table.tex, training.tex, every figure as PNG and PDF,
    and report.html, which holds all of them. With ``partial`` unfinished, failed and
    damaged runs are listed instead of refused, and so are finished ones that cannot be
    compared with the others. ``cka`` are folders that ``kd-cka`` wrote. Nothing is
    written if the runs are refused.

    Raises
    ------
    SpecError
        A run is unfinished or damaged, or two runs cannot stand in one table.
    PipelineError
        matplotlib is not installed.
    """
    finished, missing = read_runs(runs, partial=partial)
    finished, mismatches = comparable(finished)
    if mismatches and not partial:
        raise mismatches[0].as_error()
    incomparable = [mismatch.as_skipped() for mismatch in mismatches]
    cohorts = make_cohorts(finished)
    table = make_table(cohorts)
    text = _text(cohorts, text_table(table), missing, incomparable)
    files = _figure_files(cohorts)
    command = report_command(runs, out, partial=partial, cka=cka)
    sentences = summarize(table, cohorts, missing, incomparable)
    shown = [*_page_figures(files, cohorts), *map(_similarity, cka)]
    content = page(
        PageContent(table, cohorts, missing, incomparable, sentences, shown, command)
    )
    files |= {
        "table.txt": text.encode(),
        "table.csv": csv_table(table).encode(),
        "table.tex": latex_table(table).encode(),
        "training.tex": latex_bases(table).encode(),
        "report.html": content.encode(),
    }
    with hold_lock(out):
        for name, data in files.items():
            write_atomically(out / name, data)
        # Figures of an earlier report would look like figures of this report.
        for name in {f"{stem}.{kind}" for stem in _FIGURES for kind in ("png", "pdf")}:
            if name not in files:
                (out / name).unlink(missing_ok=True)
    return text


def _text(
    cohorts: Sequence[Cohort],
    table: str,
    missing: Sequence[SkippedRun],
    incomparable: Sequence[SkippedRun],
) -> str:
    """Format store, table, and the state of skipped runs."""
    parts = []
    if cohorts:
        parts.append(f"Store {cohorts[0].runs[0].summary.fingerprint[:12]}\n")
    parts.append(table)
    for title, runs in ((WITHOUT_RESULTS, missing), (NOT_COMPARABLE, incomparable)):
        if runs:
            lines = "".join(f"  {one.folder}: {one.state}\n" for one in runs)
            parts.append(f"{title}:\n{lines}")
    return "\n".join(parts)


def _figure_files(cohorts: Sequence[Cohort]) -> dict[str, bytes]:
    if not cohorts:
        return {}
    return curves_files(cohorts) | throughput_files(cohorts) | parity_files(cohorts)


def _page_figures(files: dict[str, bytes], cohorts: Sequence[Cohort]) -> list[Figure]:
    """Return the figures of the page with their captions."""
    figures = []
    for stem, (title, caption) in _FIGURES.items():
        if (png := files.get(f"{stem}.png")) is None:
            continue
        if stem == "throughput":
            caption = throughput_caption(throughput_points(cohorts))
        figures.append(Figure(title, png, caption))
    return figures


def _similarity(folder: Path) -> Figure:
    about, png = read_similarity(folder)
    return Figure(f"Similarity of {about.first} and {about.second}", png, about.caption)
