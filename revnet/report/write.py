"""The files of a sweep's report."""

from __future__ import annotations

import csv
import io
import json
import os
from base64 import b64encode
from importlib.resources import files
from pathlib import Path
from typing import Any

from revnet.report.cells import FIGURES, Cell, figure, figures_of, read_cells, varied
from revnet.report.plots import memory_plot, time_plot

__all__ = ["write_report"]


def write_report(directory: Path) -> list[Cell]:
    """Write what was measured so far in a sweep: results.json, results.csv, memory.png, time.png and report.html.

    The page holds everything itself and can be sent away alone. Each file is replaced at one blow, so that none is ever
    half written.

    Args:
        directory: of the sweep, with a result.json somewhere below it for each cell.

    Returns:
        The cells.
    """
    cells = read_cells(directory)
    plots = {"memory.png": memory_plot(cells), "time.png": time_plot(cells)}
    contents = {
        "results.json": (json.dumps(cells, indent=2) + "\n").encode(),
        "results.csv": _csv(cells).encode(),
        **plots,
        "report.html": _page(cells, [plot for plot in plots.values() if plot is not None]).encode(),
    }
    for name, content in contents.items():
        if content is not None:
            unfinished = directory / f".{name}.{os.getpid()}"
            unfinished.write_bytes(content)
            os.replace(unfinished, directory / name)
    return cells


def _csv(cells: list[Cell]) -> str:
    keys = dict.fromkeys(key for cell in cells for key in cell["overrides"])
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["cell", *keys, "status", "reason", *(column.path for column in FIGURES)])
    for cell in cells:
        values = [cell["overrides"].get(key) for key in keys]
        found = [figure(cell, column.path) for column in FIGURES]
        table.writerow([cell["cell"] + 1, *values, cell["status"], cell.get("reason"), *found])
    return text.getvalue()


def _page(cells: list[Cell], plots: list[bytes]) -> str:
    from jinja2 import Environment  # not needed until the first cell is measured

    keys = varied(cells)
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files("revnet.report").joinpath("page.html").read_text("utf-8")
    )
    return template.render(
        cells=cells,
        keys=keys,
        common={k: v for k, v in cells[0]["overrides"].items() if k not in keys} if cells else {},
        columns=sorted(figures_of(cells), key=lambda column: not column.first),
        figure=figure,
        plots=[b64encode(plot).decode() for plot in plots],
        environment=_environment(cells),
    )


def _environment(cells: list[Cell]) -> dict[str, Any]:
    """What all cells were measured with; of the failed ones too if there are no others."""
    found = [cell["environment"] for cell in cells if cell["status"] == "ok"] or [cell["environment"] for cell in cells]
    merged = {key: value for environment in found for key, value in environment.items()}
    return {key: value for key, value in merged.items() if all(other.get(key) == value for other in found)}
