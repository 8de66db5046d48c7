"""Records beside a run what it was trained with."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from revnet.environment import environment

__all__ = ["EnvironmentRecord"]


class EnvironmentRecord(Callback):
    """Write the `environment` of a training to `environment.json`, or `environment_1.json` and so on when it goes on.

    That a training has such a file says that it has begun.

    Args:
        directory: of the run.
    """

    def __init__(self, directory: str | PathLike[str]) -> None:
        self.directory = Path(directory)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file, in one process."""
        if trainer.is_global_zero:
            number = len(list(self.directory.glob("environment*.json")))
            file = self.directory / (f"environment_{number}.json" if number else "environment.json")
            self.directory.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(environment(), indent=2) + "\n")
