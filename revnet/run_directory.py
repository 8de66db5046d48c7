"""No run overwrites another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, read_write

from revnet.mistakes import leave

__all__ = ["KeepRuns"]


class KeepRuns(Callback):
    """Refuse a run or sweep whose directory is there already, before anything is written.

    Resuming (`ckpt_path` is given) goes on in a directory, with a record of its configuration beside the first one. So
    do the processes of a distributed run that are not its first.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Look at the run's directory."""
        HydraConfig.instance().set_config(config)  # the directory's name refers to it
        directory = Path(config.hydra.run.dir)
        if not config.get("ckpt_path"):
            last = directory / "checkpoints" / "last.ckpt"
            resume = f", or resume the run with ckpt_path={last}" if last.is_file() else ""
            self._refuse(config, directory, f"choose another run_dir{resume}")
        elif config.hydra.output_subdir is not None:
            earlier = len(list(directory.glob(f"{config.hydra.output_subdir}*")))
            with read_write(config.hydra):
                config.hydra.output_subdir += f"_{earlier}" if earlier else ""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Look at the sweep's directory."""
        if any(override.startswith("run_dir=") for override in config.hydra.overrides.task):
            line = "run_dir is the directory of one run; hydra.sweep.dir is that of a sweep, whose runs are numbered"
            leave(config.hydra.job.config_name, line, status=2)
        self._refuse(config, Path(config.hydra.sweep.dir), "choose another hydra.sweep.dir")

    def _refuse(self, config: DictConfig, directory: Path, remedy: str) -> None:
        first = all(os.environ.get(rank, "0") == "0" for rank in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
        if first and directory.is_dir() and any(directory.iterdir()):
            line = f"{directory} is not empty and nothing is written over: {remedy}"
            leave(config.hydra.job.config_name, line, status=2)
