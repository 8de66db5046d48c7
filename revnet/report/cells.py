"""The cells of a sweep: what was found, what tells one from another, and how figures are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "FIGURES",
    "PARTS",
    "Cell",
    "Figure",
    "figure",
    "figures_of",
    "name",
    "read_cells",
    "readable_bytes",
    "varied",
]

Cell = dict[str, Any]  # what `revnet-profile` writes into result.json

# What the memory of a step consists of.
PARTS = ("parameters", "gradients", "optimizer", "input", "activations", "temporaries")


def readable_bytes(size: float) -> str:
    """A number of bytes to be read: 3 digits and a decimal unit.

    Example:
        >>> from revnet.report.cells import readable_bytes
        >>> readable_bytes(463_000_000), readable_bytes(3 * 10**9)
        ('463 MB', '3.00 GB')
    """
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.2f} GB" if size < 100 else f"{size:,.0f} GB"


def _seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if value < 0.9995 else f"{value:.2f} s"


class Figure(NamedTuple):
    """A figure of a cell: its heading, where it stands, how it is written, whether it is among the first to look at."""

    heading: str
    path: str
    write: Callable[[Any], str]
    first: bool = False


FIGURES = (
    Figure("largest batch", "max_batch", "{:,}".format, first=True),
    Figure("memory", "memory.total", readable_bytes, first=True),
    *(Figure(part, f"memory.{part}", readable_bytes) for part in PARTS),
    Figure("peak", "memory.peak", readable_bytes, first=True),
    Figure("forward", "time.forward", _seconds),
    Figure("backward", "time.backward", _seconds),
    Figure("update", "time.optimizer", _seconds),
    Figure("time", "time.step", _seconds, first=True),
    Figure("time / store", "seconds_over_store", "{:.2f}".format, first=True),
    Figure("images/s", "images_per_second", "{:,.0f}".format, first=True),
    Figure("GFLOP", "flops", lambda flops: f"{flops / 1e9:,.1f}"),
)


def figure(cell: Cell, path: str) -> Any:
    """The figure at `path` of a cell, None where it has none."""
    value: Any = cell
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def figures_of(cells: Sequence[Cell]) -> list[Figure]:
    """The figures that any of the cells has."""
    return [column for column in FIGURES if any(figure(cell, column.path) is not None for cell in cells)]


def read_cells(directory: Path) -> list[Cell]:
    """The cells measured so far in a sweep's directory, in their order."""
    cells = [json.loads(path.read_text("utf-8")) for path in directory.rglob("result.json")]
    return sorted(cells, key=lambda cell: cell["cell"])


def varied(cells: Sequence[Cell]) -> list[str]:
    """The keys of the command line whose values differ between the cells."""
    keys = dict.fromkeys(key for cell in cells for key in cell["overrides"])
    return [key for key in keys if len({cell["overrides"].get(key) for cell in cells}) > 1]


def name(cell: Cell, keys: Sequence[str]) -> str:
    """What tells a cell from the others, in a few words."""
    return " ".join(cell["overrides"].get(key, "") for key in keys)
