"""What a result was obtained with."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

__all__ = ["environment"]


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
