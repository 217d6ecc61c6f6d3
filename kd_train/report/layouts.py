"""The comparison table as text, CSV and LaTeX, each with what rows rest on."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from math import isfinite, nan

from kd_train.report.basis import BASIS_COLUMNS, basis_digits
from kd_train.report.tables import Column, Group, Row, Spread, Table

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: "\\" + character for character in "&%$#_{}"},
    "Å": r"\AA{}",
    "→": r"$\rightarrow$",
    "λ": r"$\lambda$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "–": "--",
    "−": "$-$",
    "…": r"\dots{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


def text_table(table: Table) -> str:
    """Format the table for a terminal: aligned columns, footnotes, bases of rows."""
    if not table.rows:
        return "\n".join(table.notes) + "\n"
    rows = table.rows
    columns = [["", "  model", *(f"  {row.label}" for row in rows)]]
    columns.append(["", "seeds", *map(_seeds, rows)])
    for column in table.columns:
        unit = f"[{column.unit}]" if column.unit else ""
        values = [row.values[column.name] for row in rows]
        columns.append([column.title, unit, *_align(values, column.decimals)])
        if table.has_gaps:
            gaps = [row.gaps[column.name] if row.gaps else None for row in rows]
            columns.append(["gap closed", "[%]", *_align(gaps, 1)])
    columns = [_pad(texts, left=i == 0) for i, texts in enumerate(columns)]
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    rule = "-" * max(map(len, lines))
    body = iter(lines[2:])
    text = lines[:2]
    for group in table.groups:
        text += [rule, group.title, *(next(body) for _ in group.rows)]
    return "\n".join([*text, rule, *table.notes, "", *_basis_lines(table)]) + "\n"


def _basis_lines(table: Table) -> list[str]:
    """Format what the rows rest on, a line for each row, below its title."""
    groups = basis_groups(table)
    rows = [row for group in groups for row in group.rows]
    columns = [_pad(["", *(f"  {row.label}" for row in rows)], left=True)]
    for place, column in enumerate(BASIS_COLUMNS):
        texts = [column.text(row.basis) for row in rows if row.basis is not None]
        columns.append(_pad([column.title, *texts], left=place == 0))
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    body = iter(lines[1:])
    text = lines[:1]
    for group in groups:
        text += [group.title, *(next(body) for _ in group.rows)]
    return text


def basis_groups(table: Table) -> list[Group]:
    """Return the groups of the table without the rows of the teacher."""
    groups = [
        Group(group.title, tuple(row for row in group.rows if row.basis is not None))
        for group in table.groups
    ]
    return [
        Group(group.title.replace(" and teacher", ""), group.rows)
        for group in groups
        if group.rows
    ]


def csv_table(table: Table) -> str:
    """Format the table as CSV with all digits; missing values are empty."""
    buffer = io.StringIO()
    header = ["student", "strategy", "settings", "seeds", "steps", "val_split"]
    for column in table.columns:
        header += [column.name, f"{column.name}_sd"]
        if table.has_gaps:
            header += [f"{column.name}_gap_closed", f"{column.name}_gap_closed_sd"]
    header += [column.name for column in BASIS_COLUMNS]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for row in table.rows:
        steps = "" if row.steps is None else row.steps
        cells = [row.student, row.strategy, row.settings, _seeds(row)]
        cells += [str(steps), row.split or table.val_split]
        for column in table.columns:
            cells += _digits(row.values[column.name])
            if table.has_gaps:
                cells += _digits(row.gaps[column.name] if row.gaps else Spread(nan))
        cells += basis_digits(row.basis)
        writer.writerow(cells)
    return buffer.getvalue()


def latex_table(table: Table) -> str:
    r"""Format the table as a ``tabular`` for ``\\input`` with the package booktabs.

    The best mean of a student is bold. Footnotes are comments at the end.
    """
    width = 2 + len(table.columns) * (1 + table.has_gaps)
    head = list(_latex_head(table))
    groups = [
        (group.title, [_latex_cells(row, table) for row in group.rows])
        for group in table.groups
    ]
    lines = _tabular(f"l{'r' * (width - 1)}", head, groups)
    # A line break in a note would end the comment.
    lines += [f"% {' '.join(note.split())}" for note in table.notes]
    return "\n".join(lines) + "\n"


def latex_bases(table: Table) -> str:
    """Format what the rows rest on as a ``tabular``, as `latex_table` does."""
    titles = ["", *(escape_latex(column.title) for column in BASIS_COLUMNS)]
    groups = [
        (group.title, [_latex_basis(row) for row in group.rows])
        for group in basis_groups(table)
    ]
    spec = f"ll{'r' * (len(BASIS_COLUMNS) - 1)}"
    return "\n".join(_tabular(spec, [_latex_row(titles)], groups)) + "\n"


def _latex_basis(row: Row) -> Iterator[str]:
    assert row.basis is not None
    yield r"\quad " + escape_latex(row.label)
    for column in BASIS_COLUMNS:
        yield escape_latex(column.text(row.basis))


def _tabular(
    spec: str,
    head: Iterable[str],
    groups: Iterable[tuple[str, Iterable[Iterable[str]]]],
) -> list[str]:
    """Return the lines of a tabular: header lines, then rows below their titles."""
    lines = [
        "% Needs \\usepackage{booktabs} in the preamble.",
        f"\\begin{{tabular}}{{{spec}}}",
        "\\toprule",
        *head,
    ]
    for title, rows in groups:
        spanned = f"\\multicolumn{{{len(spec)}}}{{l}}{{{escape_latex(title)}}}"
        lines += ["\\midrule", f"{spanned} \\\\", *map(_latex_row, rows)]
    return [*lines, "\\bottomrule", "\\end{tabular}"]


def escape_latex(text: str) -> str:
    """Escape ``text`` so that LaTeX prints it unchanged."""
    return "".join(_LATEX.get(character, character) for character in text)


def format_mean_sd(spread: Spread, decimals: int) -> str:
    """Format mean ± deviation, or the part that exists."""
    return " ± ".join(part for part in spread.parts(decimals) if part)


def _latex_head(table: Table) -> Iterator[str]:
    """Yield two header lines: names of metrics, then units."""
    titles, units = ["", "seeds"], ["", ""]
    for column in table.columns:
        titles.append(escape_latex(column.title))
        # Brackets at the start of a line would be an argument of the break before.
        units.append(f"{{[{escape_latex(column.unit)}]}}" if column.unit else "")
        if table.has_gaps:
            titles.append("gap")
            units.append("{[\\%]}")
    yield _latex_row(titles)
    yield _latex_row(units)


def _latex_cells(row: Row, table: Table) -> Iterator[str]:
    yield r"\quad " + escape_latex(row.label)
    yield _seeds(row)
    for column in table.columns:
        text = _latex_number(format_mean_sd(row.values[column.name], column.decimals))
        yield rf"\textbf{{{text}}}" if column.name in row.best else text
        if table.has_gaps:
            yield _latex_number(gap_text(row, column))


def _latex_number(text: str) -> str:
    """Format a number with a minus sign instead of a hyphen."""
    return escape_latex(text.replace("-", "−"))


def gap_text(row: Row, column: Column) -> str:
    """Format the gap closed in percent, empty if a gap is not defined."""
    return format_mean_sd(row.gaps[column.name], 1) if row.gaps else ""


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _align(spreads: Sequence[Spread | None], decimals: int) -> list[str]:
    """Align texts with the signs ± below each other; None gives blanks."""
    parts = [("", "") if s is None else s.parts(decimals) for s in spreads]
    means = max(len(mean) for mean, _ in parts)
    deviations = max(len(deviation) for _, deviation in parts)
    tails = [f" ± {d:>{deviations}}" if d else "" for _, d in parts]
    width = deviations + 3 if deviations else 0
    return [f"{m:>{means}}{t:<{width}}" for (m, _), t in zip(parts, tails, strict=True)]


def _pad(texts: list[str], *, left: bool) -> list[str]:
    width = max(map(len, texts))
    return [text.ljust(width) if left else text.rjust(width) for text in texts]


def _seeds(row: Row) -> str:
    return str(row.seeds) if row.seeds else ""


def _digits(spread: Spread) -> list[str]:
    pair = (getattr(spread, field.name) for field in fields(spread))
    return [repr(value) if isfinite(value) else "" for value in pair]
