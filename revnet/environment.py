"""What a result was obtained with."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

__all__ = ["environment"]

PACKAGE = Path(__file__).parent


def environment() -> dict[str, str | int | None]:
    """Describe software and hardware: date, versions, command, commits, machine, threads, GPU.

    `commit` is that of this package's checkout, if it is one, `commit_here` that of the one that the program runs in.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("revnet", "torch", "torchvision", "pytorch-lightning")},
        # Installed, the package lies perhaps within the checkout of something else.
        "commit": None if "site-packages" in PACKAGE.parts else _commit(PACKAGE),
        "commit_here": _commit(Path.cwd()),
        "command": shlex.join(sys.argv),
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _commit(directory: Path) -> str | None:
    try:
        described = subprocess.run(
            ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None  # no git, or not a checkout
    return described.stdout.strip()
