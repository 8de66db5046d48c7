"""Figures in the terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich
from rich.markup import escape
from rich.table import Table

from revnet.report.cells import Cell, figure, figures_of, read_cells, varied

__all__ = ["end_sweep", "headline", "print_cell"]


def headline(cell: Cell) -> str:
    """The first figures of a cell in one line, or why it failed."""
    if cell["status"] == "failed":
        return f"failed: {cell['reason']}"
    return ", ".join(f"{f.heading} {f.write(figure(cell, f.path))}" for f in figures_of([cell]) if f.first)


def print_cell(cell: Cell, files: str) -> None:
    """Print all figures of one cell, one below the other.

    Args:
        cell: one that did not fail.
        files: where they were written.
    """
    table = _table(_title([cell]), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for column in figures_of([cell]):
        table.add_row(column.heading, column.write(figure(cell, column.path)))
    table.add_row("written to", escape(files))
    rich.print(table)
    if "plan" in cell:
        rich.print(escape(cell["plan"]))


def end_sweep(directory: Path) -> list[Cell]:
    """Print the first figures of a sweep's cells, a line for each, why cells failed, and where the report is.

    Args:
        directory: of the sweep.

    Returns:
        The cells.
    """
    cells = read_cells(directory)
    keys, columns = varied(cells), [f for f in figures_of(cells) if f.first]
    table = _table(_title(cells), box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("cell", justify="right")
    for key in keys:
        table.add_column(escape(key.rpartition(".")[-1]), overflow="fold")
    for column in columns:
        table.add_column(column.heading, justify="right")
    failures: dict[str, list[str]] = {}
    for cell in cells:
        found = [(column, figure(cell, column.path)) for column in columns]
        values = ["" if value is None else column.write(value) for column, value in found]
        if cell["status"] == "failed":
            values[:1] = ["[red]failed[/]"]
            failures.setdefault(cell["reason"], []).append(str(cell["cell"] + 1))
        table.add_row(str(cell["cell"] + 1), *(escape(cell["overrides"].get(key, "")) for key in keys), *values)
    rich.print(table)
    for reason, numbers in failures.items():
        rich.print(f"cell {', '.join(numbers)} [red]failed[/]: {escape(reason)}")
    if cells:
        rich.print(f"written to {escape(os.path.relpath(directory / 'report.html'))}")
    return cells


def _table(title: str, **options: Any) -> Table:
    return Table(title=escape(title), title_justify="left", **options)


def _title(cells: Sequence[Cell]) -> str:
    keys = varied(cells)
    common = [f"{key}={value}" for key, value in cells[0]["overrides"].items() if key not in keys] if cells else []
    return " ".join(["revnet-profile", *common])
