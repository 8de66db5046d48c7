"""Cells as `revnet-profile` writes them."""

import json
from pathlib import Path
from typing import Any

__all__ = ["MB", "failed", "measured", "write_cells"]

MB = 10**6


def measured(number: int, total: int, seconds: float, **overrides: str) -> dict[str, Any]:
    """A cell of `total` MB and `seconds`; a quarter of the memory is parameters, the rest activations."""
    memory = {"parameters": total * MB // 4, "activations": 3 * total * MB // 4, "total": total * MB}
    figures = {"memory": memory, "time": {"step": seconds}, "images_per_second": 8 / seconds}
    return {**_cell(number, overrides), "status": "ok", **figures}


def failed(number: int, reason: str, **overrides: str) -> dict[str, Any]:
    """A cell that failed."""
    return {**_cell(number, overrides), "status": "failed", "reason": reason}


def _cell(number: int, overrides: dict[str, str]) -> dict[str, Any]:
    environment = {"torch": "2.15", "command": "revnet-profile -m <made up>", "gpu": None}
    return {"cell": number, "overrides": {"data": "fake", **overrides}, "environment": environment}


def write_cells(directory: Path, *cells: dict[str, Any]) -> Path:
    """Write them where a sweep does."""
    for cell in cells:
        (directory / str(cell["cell"])).mkdir(parents=True)
        (directory / str(cell["cell"]) / "result.json").write_text(json.dumps(cell))
    return directory
