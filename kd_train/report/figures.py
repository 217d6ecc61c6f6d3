"""Style, canvas, colours and files of figures, with a lazy import of matplotlib."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kd_train.config.strategy_names import BASELINE
from kd_train.report.grouping import Cohort
from pipeline.errors import PipelineError

GRID: Any = {"color": "#e6e6e6", "linewidth": 0.6}
# Okabe and Ito's colours, which the colour-blind can distinguish, and three more.
_PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f3c8d",
    "#8c6d31",
    "#b2182b",
    "#5a7d00",
)
_GREY = "#4d4d4d"
_LINES = ("-", "--", "-.", ":")
_PALEST = 0.45
_STYLE: Any = {
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    # Letters as text, so that a paper's figure can be searched and edited.
    "pdf.fonttype": 42,
}
_DPI = 160


@dataclass(frozen=True)
class RowStyle:
    """Colour (as ``#rrggbb``) and line style of a row.

    ``strategy_color`` is the same for all rows of a strategy: for panels of one row.
    """

    color: str
    line: str
    strategy_color: str


def row_styles(cohorts: Sequence[Cohort]) -> dict[str, RowStyle]:
    """Return the style of every row by its label, the same in all figures.

    A strategy has a colour, grey for plain students; rows of one strategy differ in
    line style and get paler.
    """
    rows: dict[str, dict[str, None]] = {}
    for cohort in cohorts:
        for variant in cohort.variants:
            rows.setdefault(variant.strategy, {})[variant.label] = None
    others = [name for name in rows if name != BASELINE]
    colors = {name: _PALETTE[i % len(_PALETTE)] for i, name in enumerate(others)}
    found = {}
    for strategy, labels in rows.items():
        color = colors.get(strategy, _GREY)
        for i, label in enumerate(labels):
            share = _PALEST * i / max(len(labels) - 1, 1)
            shade, line = mix_colors(color, "#ffffff", share), _LINES[i % len(_LINES)]
            found[label] = RowStyle(shade, line, color)
    return found


def mix_colors(first: str, second: str, share: float) -> str:
    """Mix two colours ``#rrggbb``, ``share`` of the way to the second."""
    pairs = [(int(first[i : i + 2], 16), int(second[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)


def new_figure(width: float, height: float) -> Any:
    """Make an empty figure, sizes in inches, without window or global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure((width, height), layout=ConstrainedLayoutEngine(h_pad=0.06))
    FigureCanvasAgg(figure)
    return figure


def style() -> Any:
    """Return the context in which figures are made and saved.

    Raises
    ------
    PipelineError
        matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise PipelineError(
            "Plots need matplotlib; install it with `pip install 'kd-train[report]'`."
        ) from None
    return matplotlib.rc_context(_STYLE)


def render_files(figure: Any, stem: str) -> dict[str, bytes]:
    """Render ``figure`` as ``stem.png`` for pages and ``stem.pdf`` for papers."""
    files = {}
    for kind, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=_DPI, metadata=metadata)
        files[f"{stem}.{kind}"] = buffer.getvalue()
        # Laid out once; both files are alike.
        figure.set_layout_engine("none")
    return files
