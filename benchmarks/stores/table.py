"""Plain-text tables of what was measured, one line a store."""

import statistics
from collections.abc import Sequence

from stores.timing import Cost

LEGEND = """\
samples/s, MB/s: median over rounds of samples, and of their bytes, per second
CPU s: processor seconds of all threads for 1000 samples, kernel included (median)
x base: time of the base / time of this, paired within a round; median (least-most)"""


def print_table(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], legend: str = ""
) -> None:
    """A title and columns as wide as they need, the first aligned to the left."""
    widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
    print(f"\n{title}")
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [
            cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
        ]
        print("  ".join(cells).rstrip())
    if legend:
        print(legend)


def cost_cells(costs: Sequence[Cost], base: Sequence[Cost]) -> list[str]:
    """Samples/s, MB/s, CPU seconds per 1000 samples, ratio of rates to ``base``."""
    rate = statistics.median(cost.rate for cost in costs)
    speed = statistics.median(cost.n_bytes / cost.wall / 1e6 for cost in costs)
    cpu = statistics.median(cost.cpu / cost.samples * 1e3 for cost in costs)
    return [f"{rate:,.0f}", f"{speed:,.0f}", f"{cpu:.3f}", ratio_cell(costs, base)]


def ratio_cell(costs: Sequence[Cost], base: Sequence[Cost]) -> str:
    """How many times the rate of ``base``, round by round: median (least-most)."""
    pairs = zip(costs, base, strict=True)
    ratios = sorted(cost.rate / other.rate for cost, other in pairs)
    middle = statistics.median(ratios)
    return f"{significant(middle)} ({significant(ratios[0])}-{significant(ratios[-1])})"


def significant(value: float) -> str:
    """Three digits, without an exponent."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 4
    return f"{value:.{decimals}f}"
