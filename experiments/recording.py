"""What every experiment writes down beside its figures: hardware, versions, command."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import torch

from revnet.profiling import KEEP_FREED_MEMORY, device_name

__all__ = ["RESULTS", "ROOT", "allocator_keeps_memory", "hardware", "record", "result_path", "resumed"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"


def _commit() -> str | None:
    """That of the code; what is in `RESULTS` does not make it another."""
    git = ["git", "-C", str(ROOT)]
    changes = ["status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RESULTS.relative_to(ROOT)}"]
    try:
        commit, changed = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], changes)
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None  # no git, or not a checkout
    return f"{commit}-dirty" if changed else commit


COMMIT = _commit()  # when this was loaded, and the package with it: a measurement takes hours


def allocator_keeps_memory() -> None:
    """Starts the script again with `KEEP_FREED_MEMORY`, unless it runs so already."""
    if all(os.environ.get(name) == value for name, value in KEEP_FREED_MEMORY.items()):
        return
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_FREED_MEMORY})


def hardware(device: str = "cpu") -> dict[str, Any]:
    """The machine and the versions that a result depends on."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("torchvision", "pytorch-lightning")},
        "system": f"{platform.system()} {platform.machine()}",
    }


def result_path(theme: str, device: str = "cpu") -> Path:
    """`experiments/results/THEME_HARDWARE_DATE`, without an ending; with a number behind it if there is one already."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{_stem(theme, device)}_{datetime.now(timezone.utc):%Y-%m-%d}"
    names = (path if number == 1 else path.with_name(f"{path.name}_{number}") for number in count(1))
    return next(name for name in names if not name.with_suffix(".json").exists())


def _stem(theme: str, device: str) -> str:
    name = hardware(device)["device"] if device.startswith("cuda") else f"cpu{torch.get_num_threads()}"
    return f"{theme}_" + re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def record(path: Path, settings: dict[str, Any], rows: list[dict[str, Any]], device: str = "cpu") -> None:
    """Writes settings, hardware, command, rows and the commits that they were measured at, oldest first, as PATH.json.

    A file that is there already is gone on with: its commits stay, null for rows of which nobody knows theirs.
    """
    command = shlex.join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]])
    file = path.with_suffix(".json")
    known = json.loads(file.read_text()).get("commits", [None]) if file.exists() else []
    content = {
        "command": command,
        "commits": known if COMMIT in known else [*known, COMMIT],
        "hardware": hardware(device),
        "settings": settings,
        "rows": rows,
    }
    # Paths are given from the root of the checkout, wherever that lay.
    text = json.dumps(content, indent=2).replace(f"{ROOT}/", "")
    part = path.with_suffix(".part")
    part.write_text(text + "\n")
    part.replace(file)


def resumed(
    theme: str, settings: dict[str, Any], device: str = "cpu", path: Path | None = None
) -> tuple[Path, list[dict[str, Any]]]:
    """Where to write, without an ending, and the rows that stand there already.

    That is `path` if given; else the latest result of the theme with these settings on this hardware and with these
    versions; else a new one. A result of other settings or of another machine is never written over.
    """
    if path is None:
        kin = sorted(RESULTS.glob(f"{_stem(theme, device)}_????-??-??*.json"), reverse=True)
        path = next((p for p in kin if _matches(p, settings, device)), None) or result_path(theme, device)
    path = path.with_suffix("")
    file = path.with_suffix(".json")
    if not file.exists():
        return path, []
    if not _matches(file, settings, device):
        raise SystemExit(f"{file} is of other settings or another machine; move it away, or name another by --resume")
    return path, json.loads(file.read_text())["rows"]


def _matches(path: Path, settings: dict[str, Any], device: str) -> bool:
    content = json.loads(path.read_text())
    return bool(content["settings"] == settings and content["hardware"] == hardware(device))
