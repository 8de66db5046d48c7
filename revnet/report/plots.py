"""Plots of a sweep's cells."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from revnet.report.cells import PARTS, Cell, figure, name, varied

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["memory_plot", "time_plot"]

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#f0e442", "#e69f00", "#d55e00", "#cc79a7", "#999999")
WIDTH = 5.4  # inches: at the width of a phone the letters keep their size


def memory_plot(cells: Sequence[Cell]) -> bytes | None:
    """Stacked bars, one for each cell: what the memory of a step consists of at its peak.

    Returns:
        A PNG, or None if no cell has these figures.
    """
    shown = [cell for cell in cells if figure(cell, "memory") is not None or cell["status"] == "failed"]
    if all(cell["status"] == "failed" for cell in shown):
        return None
    keys = varied(cells)
    unit, size = _unit(shown)
    plot, axes = _axes(height=1.4 + 0.3 * len(shown))
    legend: list[Any] = []
    ends = [0.0] * len(shown)
    for part, colour in zip(PARTS, COLOURS, strict=False):
        sizes = [(figure(cell, f"memory.{part}") or 0) / size for cell in shown]
        if any(sizes):
            legend.append(axes.barh(range(len(shown)), sizes, left=ends, height=0.7, color=colour, label=part))
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    for row, cell in enumerate(shown):
        if cell["status"] == "failed":
            axes.text(0, row, " failed", va="center", color="#a00000", fontsize=9)
        else:
            whole = figure(cell, "memory.total") / size  # less than the bar: not all of it is there at the same time
            mark = axes.plot(whole, row, "|", color="black", markersize=14, markeredgewidth=2, label="most at once")
    axes.set_yticks(range(len(shown)), [f"{name(cell, keys)}  {cell['cell'] + 1}" for cell in shown])
    axes.invert_yaxis()
    axes.set_xlabel(f"memory of a step, {unit}")
    _legend(plot, handles=legend + mark)
    return _png(plot)


def time_plot(cells: Sequence[Cell]) -> bytes | None:
    """Time of a step against its memory, a point with its number for each cell.

    Returns:
        A PNG, or None if fewer than two cells have both figures.
    """
    shown = [cell for cell in cells if figure(cell, "time.step") and figure(cell, "memory.total")]
    if len(shown) < 2:
        return None
    unit, size = _unit(shown)
    key = next(iter(varied(shown)), "")
    groups: dict[str, list[Cell]] = {}
    for cell in shown:
        groups.setdefault(cell["overrides"].get(key, ""), []).append(cell)
    plot, axes = _axes(height=3.8)
    for number, (group, members) in enumerate(groups.items()):
        x = [figure(cell, "memory.total") / size for cell in members]
        y = [figure(cell, "time.step") for cell in members]
        axes.plot(x, y, "o", color=COLOURS[5 * number % len(COLOURS)], label=group)
        for cell, place in zip(members, zip(x, y, strict=True), strict=True):
            axes.annotate(str(cell["cell"] + 1), place, xytext=(5, 4), textcoords="offset points", fontsize=9)
    axes.set_xlim(0, 1.1 * axes.dataLim.xmax)
    axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
    axes.set_xlabel(f"memory of a step, {unit}")
    axes.set_ylabel("time of a step, s")
    if key:
        _legend(plot)
    return _png(plot)


def _unit(cells: Sequence[Cell]) -> tuple[str, int]:
    most = max(figure(cell, "memory.total") or 0 for cell in cells)
    return ("GB", 10**9) if most >= 10**9 else ("MB", 10**6)


def _legend(plot: Figure, **options: Any) -> None:
    plot.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9, **options)


def _axes(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # takes a while to import, and --help need not wait for it

    plot = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = plot.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return plot, axes


def _png(plot: Figure) -> bytes:
    buffer = BytesIO()
    plot.savefig(buffer, format="png", dpi=180)
    return buffer.getvalue()
