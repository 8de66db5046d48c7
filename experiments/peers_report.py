"""Tables and picture of what `peers.py` has measured."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from matplotlib.ticker import LogLocator
from peers_contestants import CHECKPOINT, EXACT, FORWARD, LOOP, NARROW, REVERSAL
from rich.console import Console
from rich.table import Table

matplotlib.use("agg")
import matplotlib.pyplot as plt

__all__ = ["CELL", "by_cell", "report"]

CELL = ("width", "units", "dtype", "format")
FORMATS = ("channels_last", "NCHW")
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
AGREES = {"float32": 1e-2, "bfloat16": 0.25}  # relative error of the gradient from which it is marked

Rows = dict[str, dict[str, Any]]  # the rows of one cell by contestant
Cells = dict[tuple[Any, ...], Rows]


def ratio(rows: Rows, name: str, other: str) -> float:
    """Median of the ratio of times within a round."""
    return median(a / b for a, b in zip(rows[name]["all_seconds"], rows[other]["all_seconds"], strict=True))


def forwards(rows: Rows) -> float:
    """What reconstruct costs beyond store, in forward passes."""
    columns = (rows[name]["all_seconds"] for name in ("reconstruct", "store", FORWARD))
    return median((a - b) / c for a, b, c in zip(*columns, strict=True))


def best(cells: Cells, cell: tuple[Any, ...], name: str) -> float:
    """Seconds of a contestant in the memory format that suits it better; nan if only one is measured."""
    both = [cells.get((*cell[:-1], memory_format), {}).get(name) for memory_format in FORMATS]
    return math.nan if None in both else min(row["seconds"] for row in both if row is not None)


def over_best_format(cells: Cells, cell: tuple[Any, ...], name: str, other: str) -> float:
    """Time of `name` in this cell over that of `other` in the memory format that suits the other better."""
    rows, seconds = cells[cell], best(cells, cell, other)
    return ratio(rows, name, other) if seconds == rows[other]["seconds"] else rows[name]["seconds"] / seconds


def over_lowest_peak(rows: Rows, name: str) -> float:
    """Peak of `name` over the lowest of the others with a stream of the same dtype.

    Left out are variants of ours and the reversal that leaves out all but the reversal.
    """
    mine = rows[name]
    left_out = (name, EXACT, FORWARD, REVERSAL)
    others = [r["peak_bytes"] for n, r in rows.items() if n not in left_out and r["stream"] == mine["stream"]]
    return mine["peak_bytes"] / min(others)


def targets(cells: Cells, cell: tuple[Any, ...]) -> dict[str, tuple[float, float]]:
    """For each target what was found in a cell, and the limit. Time and peak are those of reconstruct.

    RevTorch is taken in its better memory format; where it says so, reconstruct too.
    """
    rows = cells[cell]
    found = {
        "store / loop": (ratio(rows, "store", LOOP), 1.02),
        "recompute / checkpoint": (ratio(rows, "recompute", CHECKPOINT), 1.05),
        "forwards beyond store": (forwards(rows), 1.1),
        "time / recompute": (ratio(rows, "reconstruct", "recompute"), 1.05),
    }
    if REVERSAL in rows:
        found["time / hand-written"] = (ratio(rows, "reconstruct", REVERSAL), 1.05)
    for stream, label in (("", ""), (NARROW, "bf16 stream, ")):
        name = "reconstruct" + stream
        if name in rows:
            found |= {
                f"{label}time / MemCNN": (ratio(rows, name, "MemCNN" + stream), 0.75),
                f"{label}time / RevTorch": (over_best_format(cells, cell, name, "RevTorch" + stream), 0.95),
                f"{label}time / RevTorch, both at best": (
                    best(cells, cell, name) / best(cells, cell, "RevTorch" + stream),
                    0.95,
                ),
                f"{label}peak / lowest": (over_lowest_peak(rows, name), 1.0),
            }
    return found


def show(cells: Cells) -> None:
    """What was measured by contestant, and the targets cell by cell."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    table = Table(
        "", "stream", "time / store", "peak / store", "gradient error", title="Median of the cells, and range"
    )
    for dtype in dict.fromkeys(cell[2] for cell in cells):
        of_dtype = [rows for cell, rows in cells.items() if cell[2] == dtype]
        for name in dict.fromkeys(name for rows in of_dtype for name in rows):
            pairs = [(rows[name], rows["store"]) for rows in of_dtype if name in rows]
            figures = [_spread([row["over_store"] for row, _ in pairs], ".2f")]
            if name != FORWARD:
                errors = [row["gradient_error"] for row, _ in pairs]
                figures.append(_spread([row["peak_bytes"] / store["peak_bytes"] for row, store in pairs], ".3f"))
                figures.append(_spread(errors, ".0e") + ("" if max(errors) <= AGREES[dtype] else " [red]!"))
            table.add_row(f"{SHORT[dtype]}: {name}", pairs[0][0].get("stream", ""), *figures)
        table.add_section()
    console.print(table)
    console.print(f"! gradients that disagree with those of store: relative error above {AGREES}")

    found = {cell: targets(cells, cell) for cell in cells}
    limits = {name: limit for values in found.values() for name, (_, limit) in values.items()}
    title = "Targets (! missed, ? the other memory format is not measured); time and peak are those of reconstruct"
    table = Table(title=title, show_footer=True)
    table.add_column("width x units", "met", no_wrap=True)
    for name, limit in limits.items():
        measured = [value for values in found.values() if (value := values.get(name, (math.nan,))[0]) == value]
        met = sum(value <= limit for value in measured)
        table.add_column(f"{name}\n<= {limit}", f"{met} of {len(measured)}")
    for (width, units, dtype, memory_format), values in found.items():
        marks = [_mark(*values[name]) if name in values else "" for name in limits]
        table.add_row(f"{width} x {units} {SHORT[dtype]} {memory_format}", *marks)
    console.print(table)


def _spread(values: list[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _mark(value: float, limit: float) -> str:
    if math.isnan(value):
        return "?"
    return f"[green]{value:.2f}" if value <= limit else f"[red]{value:.2f} !"


def draw(cells: Cells, title: str, path: Path) -> None:
    """Time against peak, one point for each contestant and cell."""
    panels = list(dict.fromkeys(cell[2:] for cell in cells))
    columns = min(2, len(panels))
    figure, grid = plt.subplots(
        math.ceil(len(panels) / columns), columns, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    figure.set_size_inches(5 * columns + 2.5, 3.8 * len(grid) + 0.5)
    names = [n for n in dict.fromkeys(n for rows in cells.values() for n in rows) if n != FORWARD]
    whole = [name for name in names if not name.endswith(NARROW)]
    for axis, panel in zip(grid.flat, panels, strict=False):
        inside = {cell: rows for cell, rows in cells.items() if cell[2:] == panel}
        for name in names:
            found = [(rows[name], rows["store"], cell[1]) for cell, rows in inside.items() if name in rows]
            colour = f"C{whole.index(name.removesuffix(NARROW))}"
            axis.scatter(
                [row["peak_bytes"] / store["peak_bytes"] for row, store, _ in found],
                [row["over_store"] for row, _, _ in found],
                s=[12 + 3 * units for *_, units in found],
                facecolors="none" if name.endswith(NARROW) else colour,
                edgecolors=colour,
                alpha=0.8,
                label=name,
            )
        limit = 1 + median(rows[FORWARD]["over_store"] for rows in inside.values())
        axis.axhline(limit, color="gray", linestyle="--", linewidth=1, label="store + a forward without gradients")
        axis.set(xscale="log", title=", ".join(panel))
        axis.get_xaxis().set_major_locator(LogLocator(subs=(1, 3)))
        axis.get_xaxis().set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in grid[-1]:
        axis.set_xlabel("peak of activations and temporaries / store")
    for axis in grid[:, 0]:
        axis.set_ylabel("time of a step / store")
    handles = {
        label: handle for axis in grid.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(handles.values()), list(handles), loc="outside right center", fontsize="small")
    figure.suptitle(title)
    figure.savefig(path.with_suffix(".png"), dpi=150)


def by_cell(rows: list[dict[str, Any]]) -> Cells:
    cells: Cells = {}
    for row in rows:
        cells.setdefault(tuple(row[key] for key in CELL), {})[row["contestant"]] = row
    return cells


def report(path: Path) -> None:
    """Tables and picture of a result, PATH.json."""
    content = json.loads(path.with_suffix(".json").read_text())
    cells, hardware, settings = by_cell(content["rows"]), content["hardware"], content["settings"]
    show(cells)
    place = f"batch {settings['batch']}, {settings['size']}x{settings['size']}, {hardware['device']}"
    draw(cells, f"A training step of reversible units, {place}; larger marks: more units", path)
    Console().print(f"Tables of {path.with_suffix('.json')}, picture: {path.with_suffix('.png')}", soft_wrap=True)
