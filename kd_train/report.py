"""``kd-report``: finished runs as table, learning curves, parity plots and web page."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from kd_train.plots import curves_png, parity_png
from kd_train.runs import Cohort, FinishedRun, read_cohorts
from kd_train.tables import (
    COLUMNS,
    MISSING,
    TEACHER,
    Group,
    Row,
    Spread,
    Table,
    csv_table,
    make_table,
    text_table,
)
from pipeline.files import write_atomically

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #222; vertical-align: bottom; }
th small { font-weight: normal; color: #666; }
tr.student th { padding-top: .8rem; border-bottom: 1px solid #bbb; text-align: left; }
tr.teacher td { border-top: 1px solid #bbb; color: #555; font-style: italic; }
.runs th, .runs td { text-align: left; }
.gap { color: #0072b2; }
.notes, figcaption { color: #555; font-size: .9em; }
img { max-width: 100%; height: auto; }
figure { margin: 1.5rem 0; }
code { overflow-wrap: anywhere; }
"""
_CAPTIONS = {
    "curves.png": "Validation errors during training, one line per run; averaged "
    "weights.",
    "parity.png": "Predictions of the exported student of the lowest seed on the "
    "validation split. Above: energy error against reference energy per atom, "
    "triangles lie beyond the edge. Below: force components, colour by the logarithm "
    "of their number.",
}


def write_report(runs: list[Path], out: Path) -> str:
    """Compare finished runs in ``out`` and return the table for a terminal.

    Writes table.txt, table.csv, curves.png, parity.png and report.html, which holds
    all of them. Nothing is written if the runs cannot be compared.

    Raises
    ------
    SpecError
        A run is unfinished or damaged, or two runs cannot stand in one table.
    PipelineError
        matplotlib is not installed.
    """
    cohorts = read_cohorts(runs)
    table = make_table(cohorts)
    fingerprint = cohorts[0].runs[0].summary.fingerprint
    text = f"Store {fingerprint[:12]}\n\n{text_table(table)}"
    figures = {"curves.png": curves_png(cohorts), "parity.png": parity_png(cohorts)}
    page = _page(table, cohorts, figures, fingerprint)
    write_atomically(out / "table.txt", text.encode())
    write_atomically(out / "table.csv", csv_table(table).encode())
    for name, content in figures.items():
        write_atomically(out / name, content)
    write_atomically(out / "report.html", page.encode())
    return text


def _page(
    table: Table, cohorts: Sequence[Cohort], figures: dict[str, bytes], fingerprint: str
) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    images = "".join(_figure(name, content) for name, content in figures.items())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Distillation report</title><style>{_STYLE}</style></head><body>\n"
        f'<h1>Distillation report</h1>\n<div class="wide">{_html_table(table)}</div>\n'
        f'<ul class="notes">{notes}</ul>\n{images}'
        f"<h2>Provenance</h2>\n<p>Store fingerprint <code>{escape(fingerprint)}</code>"
        f'</p>\n<div class="wide">{_run_table(cohorts)}</div>\n</body></html>\n'
    )


def _figure(name: str, content: bytes) -> str:
    data = base64.b64encode(content).decode()
    caption = escape(_CAPTIONS[name])
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _html_table(table: Table) -> str:
    head = ["<th>strategy</th><th>seeds</th>"]
    for column in COLUMNS:
        head.append(f"<th>{column.title}<br><small>{column.unit}</small></th>")
        if table.has_gaps:
            head.append("<th>gap closed<br><small>%</small></th>")
    width = 2 + len(COLUMNS) * (1 + table.has_gaps)
    body = []
    for group in table.groups:
        title = escape(group.title)
        body.append(f'<tr class="student"><th colspan="{width}">{title}</th></tr>\n')
        body += [_html_row(row, group, table.has_gaps) for row in group.rows]
    return (
        f"<table><thead><tr>{''.join(head)}</tr></thead>\n"
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _html_row(row: Row, group: Group, has_gaps: bool) -> str:
    """One row; the best student on a metric is bold."""
    cells = [f"<td>{escape(row.label)}</td><td>{row.seeds or ''}</td>"]
    for column in COLUMNS:
        text = _joined(row.values[column.name], column.decimals)
        if row.label == group.best(column):
            text = f"<b>{text}</b>"
        cells.append(f"<td>{text}</td>")
        if has_gaps:
            gap = _joined(row.gaps[column.name], 1) if row.gaps else ""
            cells.append(f'<td class="gap">{gap}</td>')
    kind = ' class="teacher"' if row.label == TEACHER else ""
    return f"<tr{kind}>{''.join(cells)}</tr>\n"


def _joined(spread: Spread, decimals: int) -> str:
    return " ± ".join(part for part in spread.parts(decimals) if part)


def _run_table(cohorts: Sequence[Cohort]) -> str:
    """Every run: what it was, and whether it started where its baseline did."""
    titles = (
        "folder",
        "student",
        "strategy",
        "weights",
        "seed",
        "steps",
        "parameters",
        "training time",
        "initial weights",
        "equal to baseline's",
    )
    rows = [_cells(titles, "th")]
    for cohort in cohorts:
        rows += [_cells(_provenance(run, cohort), "td") for run in cohort.runs]
    return f'<table class="runs">{"".join(rows)}</table>'


def _provenance(run: FinishedRun, cohort: Cohort) -> tuple[str, ...]:
    summary = run.summary
    # Unequal weights were refused on reading, so a baseline to compare with means yes.
    equal = "yes" if summary.seed in cohort.baselines() else MISSING
    return (
        str(run.folder),
        summary.student,
        summary.strategy,
        run.weights(),
        str(summary.seed),
        str(summary.steps),
        f"{summary.parameters:,}",
        f"{summary.seconds / 60:.1f} min",
        run.header.initial_weights[:12],
        "" if run.is_baseline else equal,
    )


def _cells(texts: Iterable[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(t)}</{tag}>' for t in texts)}</tr>\n"
