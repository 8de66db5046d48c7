"""What a result was obtained with."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from os import PathLike
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

__all__ = ["EnvironmentRecord", "environment"]


def environment() -> dict[str, str | int | None]:
    """Describe software and hardware: versions, command, commit (of a checkout), machine, threads, GPU."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("revnet", "torch", "torchvision", "pytorch-lightning")},
        "commit": _commit(),
        "command": " ".join(sys.argv),
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


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


def _commit() -> str | None:
    package = Path(__file__).parent
    if "site-packages" in package.parts:
        return None  # installed, perhaps within the checkout of something else
    try:
        described = subprocess.run(
            ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None  # no git, or not a checkout
    return described.stdout.strip()
