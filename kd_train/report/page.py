"""The report as one web page that needs no other file and no network."""

import base64
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, version

from kd_train.report.basis import BASIS_COLUMNS, MISSING
from kd_train.report.grouping import Cohort
from kd_train.report.layouts import basis_groups, format_mean_sd, gap_text
from kd_train.report.runs import FinishedRun, SkippedRun
from kd_train.report.summary import training_command
from kd_train.report.tables import TEACHER, Row, Table

WITHOUT_RESULTS = "Runs without results"
NOT_COMPARABLE = "Finished runs that are not comparable with the other runs"
_PACKAGES = ("kd-train", "torch", "numpy", "matplotlib")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem;
  margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .55rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #222; vertical-align: bottom; }
th small { font-weight: normal; color: #666; }
tr.title th { padding-top: .8rem; border-bottom: 1px solid #bbb; text-align: left; }
tr.teacher td { color: #555; font-style: italic; }
.list th, .list td { text-align: left; vertical-align: top; }
.list td.reason { white-space: normal; }
.gap { color: #0072b2; }
.notes, figcaption { color: #555; font-size: .9em; }
img { max-width: 100%; height: auto; }
figure { margin: 1.2rem 0; }
code, pre { font-size: .85em; }
code { overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6;
  padding: .6rem; }
"""


@dataclass(frozen=True)
class Figure:
    """A section of the page with one image."""

    title: str
    png: bytes
    caption: str


@dataclass(frozen=True)
class PageContent:
    """All that the page shows."""

    table: Table
    cohorts: Sequence[Cohort]
    missing: Sequence[SkippedRun]
    incomparable: Sequence[SkippedRun]
    sentences: Sequence[str]
    figures: Sequence[Figure]
    command: str


def page(report: PageContent) -> str:
    """Write the page: summary, table, figures, skipped runs, provenance."""
    sections = [
        _section("Summary", "".join(f"<p>{escape(s)}</p>\n" for s in report.sentences)),
        _section("Gap closed", _results(report.table)),
        *_bases(report.table),
        *(_section(one.title, _figure(one)) for one in report.figures),
    ]
    for title, runs in (
        (WITHOUT_RESULTS, report.missing),
        (NOT_COMPARABLE, report.incomparable),
    ):
        if runs:
            sections.append(_section(title, _skipped_table(runs)))
    sections.append(_section("Provenance", _provenance(report)))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Distillation report</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>Distillation report</h1>\n{''.join(sections)}</body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>\n"


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.png).decode()
    caption = escape(figure.caption)
    return (
        f'<figure><img alt="{escape(figure.title)}" '
        f'src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _results(table: Table) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    body = f'<div class="wide">{_html_table(table)}</div>\n' if table.rows else ""
    return f'{body}<ul class="notes">{notes}</ul>\n'


def _bases(table: Table) -> list[str]:
    """Return the section on training samples, passes of the teacher and cost."""
    rows = []
    for group in basis_groups(table):
        title = escape(group.title)
        span = 1 + len(BASIS_COLUMNS)
        rows.append(f'<tr class="title"><th colspan="{span}">{title}</th></tr>\n')
        for row in group.rows:
            assert row.basis is not None
            texts = [column.text(row.basis) for column in BASIS_COLUMNS]
            rows.append(_cells([row.label, *texts], "td"))
    if not rows:
        return []
    head = _cells(["model", *(column.title for column in BASIS_COLUMNS)], "th")
    content = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    return [_section("Training data", f'<div class="wide">{content}</div>\n')]


def _html_table(table: Table) -> str:
    head = ["<th>model</th><th>seeds</th>"]
    for column in table.columns:
        head.append(f"<th>{column.title}<br><small>{column.unit}</small></th>")
        if table.has_gaps:
            head.append("<th>gap<br><small>% closed</small></th>")
    width = 2 + len(table.columns) * (1 + table.has_gaps)
    body = []
    for group in table.groups:
        title = escape(group.title)
        body.append(f'<tr class="title"><th colspan="{width}">{title}</th></tr>\n')
        body += [_html_row(row, table) for row in group.rows]
    return (
        f"<table><thead><tr>{''.join(head)}</tr></thead>\n"
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _html_row(row: Row, table: Table) -> str:
    """Format one row, with a student's best value of a metric in bold."""
    cells = [f"<td>{escape(row.label)}</td><td>{row.seeds or ''}</td>"]
    for column in table.columns:
        text = format_mean_sd(row.values[column.name], column.decimals)
        if column.name in row.best:
            text = f"<b>{text}</b>"
        cells.append(f"<td>{text}</td>")
        if table.has_gaps:
            cells.append(f'<td class="gap">{gap_text(row, column)}</td>')
    kind = ' class="teacher"' if row.strategy == TEACHER else ""
    return f"<tr{kind}>{''.join(cells)}</tr>\n"


def _skipped_table(runs: Sequence[SkippedRun]) -> str:
    rows = [_cells(("folder", "run", "state"), "th")]
    rows += [
        f"<tr><td>{escape(str(one.folder))}</td><td>{escape(one.description)}</td>"
        f'<td class="reason">{escape(one.state)}</td></tr>\n'
        for one in runs
    ]
    return f'<div class="wide"><table class="list">{"".join(rows)}</table></div>\n'


def _provenance(report: PageContent) -> str:
    runs = [run for cohort in report.cohorts for run in cohort.runs]
    parts = []
    if runs:
        fingerprint = escape(runs[0].summary.fingerprint)
        parts.append(f"<p>Store fingerprint <code>{fingerprint}</code></p>\n")
    parts.append(f"<p>Report written by {escape(_versions())}.</p>\n")
    trained = dict.fromkeys(_format_versions(run.header.versions) for run in runs)
    parts += [f"<p>Trained by {escape(one)}.</p>\n" for one in trained if one]
    if runs:
        parts.append(f'<div class="wide">{_run_table(report.cohorts)}</div>\n')
        parts.append(_details("Settings that all runs share", _shared_settings(runs)))
    commands = [*(training_command(run) for run in runs), report.command]
    parts.append(_details("Commands (STORE is the store)", "\n".join(commands)))
    return "".join(parts)


def _details(title: str, text: str) -> str:
    return (
        f"<details><summary>{escape(title)}</summary>"
        f"<pre>{escape(text)}</pre></details>\n"
    )


def _shared_settings(runs: Sequence[FinishedRun]) -> str:
    first, *others = (run.settings for run in runs)
    missing = object()
    return "\n".join(
        f"{key}: {value}"
        for key, value in first.items()
        if all(other.get(key, missing) == value for other in others)
    )


def _versions() -> str:
    """Return the versions of this program and of its main packages."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "(not installed as a package)"
    return _format_versions({**found, "Python": platform.python_version()})


def _format_versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _run_table(cohorts: Sequence[Cohort]) -> str:
    """List every run, and whether it started from its baseline's weights."""
    titles = (
        "folder",
        "student",
        "row",
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
        for variant in cohort.variants:
            rows += [
                _cells(_run_cells(run, variant.label, cohort), "td")
                for run in variant.runs
            ]
    return f'<table class="list">{"".join(rows)}</table>'


def _run_cells(run: FinishedRun, label: str, cohort: Cohort) -> tuple[str, ...]:
    summary = run.summary
    baseline = cohort.baseline_of(run)
    # Runs of unequal weights are not here, so a baseline to compare with means yes.
    equal = MISSING if baseline is None else "" if baseline is run else "yes"
    return (
        str(run.folder),
        summary.student,
        label,
        run.weights(),
        str(summary.seed),
        str(summary.steps),
        f"{summary.parameters:,}",
        f"{summary.seconds / 60:.1f} min",
        run.header.initial_weights[:12],
        equal,
    )


def _cells(texts: Iterable[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(t)}</{tag}>' for t in texts)}</tr>\n"
