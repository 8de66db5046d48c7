"""The report of a sweep of `revnet-profile`, cell by cell."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import rich
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.markup import escape

from revnet.mistakes import leave
from revnet.report import end_sweep, headline, write_report

__all__ = ["ReportSweep"]


class ReportSweep(Callback):
    """Say after each cell of a sweep what was found, and write the report anew: an interrupted sweep has one, too."""

    def __init__(self) -> None:
        self.cells = 0
        self.keys: list[str] = []  # those that vary

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Count the cells, and see what tells them apart."""
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        params = (config.hydra.sweeper.get("params") or {}).items()  # those of an experiment
        overrides = parser.parse_overrides([*(f"{key}={value}" for key, value in params), *config.hydra.overrides.task])
        values: dict[str, list[str]] = {}
        for override in overrides:  # the last one of a key counts, also if it gives a single value
            values.pop(override.get_key_element(), None)
            if override.is_discrete_sweep():
                values[override.get_key_element()] = [*override.sweep_string_iterator()]
        self.cells, self.keys = prod(map(len, values.values())), [*values]

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Tell of the cell."""
        if config.hydra.mode == RunMode.MULTIRUN and job_return.status == JobStatus.COMPLETED:
            cell = job_return.return_value
            what = " ".join(f"{key}={cell['overrides'][key]}" for key in self.keys)
            parts = (f"cell {cell['cell'] + 1} of {self.cells}", what, headline(cell))
            rich.print(escape(": ".join(filter(None, parts))))
            write_report(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Show the table, and end with status 1 if a cell failed."""
        write_report(Path(config.hydra.sweep.dir))  # of cells that ended side by side
        cells = end_sweep(Path(config.hydra.sweep.dir))
        failed = sum(cell["status"] == "failed" for cell in cells)
        if failed:
            leave(config.hydra.job.config_name, f"{failed} of {len(cells)} cells failed", status=1)
