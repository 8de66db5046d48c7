"""The command `revnet-profile`: memory and time of a network's training step."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from revnet.cli import command
from revnet.environment import environment
from revnet.mistakes import leave
from revnet.profiling import KEEP_FREED_MEMORY
from revnet.report import end_sweep, print_cell

__all__ = ["profile", "main"]


def profile(cfg: DictConfig) -> dict[str, Any]:
    """Profile one configuration in a process of its own, which may fail in any way or be killed.

    Args:
        cfg: the configuration `profile`, from the command line or `revnet.cli.compose`.

    Returns:
        `status`, which is "ok" or "failed"; the `reason` of a failure, in one line; else the figures of the mode, see
        `revnet.profile_cell.profile_cell`; what the process wrote to `stderr`.
    """
    theirs, ours = os.pipe()  # ours closes with this process, however it ends, and the other then ends itself
    with os.fdopen(theirs), os.fdopen(ours, "w"):
        child = subprocess.run(
            [sys.executable, "-m", "revnet.profile_cell", str(theirs)],
            input=json.dumps(OmegaConf.to_container(cfg, resolve=True)),
            capture_output=True,
            text=True,
            env={**os.environ, **KEEP_FREED_MEMORY},
            pass_fds=[theirs],
            start_new_session=True,  # Ctrl-C reaches this process alone, which then kills the other
        )
    if child.returncode == -signal.SIGKILL:
        result = _failed("killed, most likely because memory ran out: a smaller batch_size, or mode=estimate")
    elif child.returncode < 0:
        result = _failed(f"the process was ended by {signal.Signals(-child.returncode).name}")
    elif child.returncode > 0:
        result = _failed(" ".join(child.stderr.strip().splitlines()[-1:]))
    else:
        result = json.loads(child.stdout)
    return {**result, "stderr": child.stderr}


def _failed(reason: str) -> dict[str, Any]:
    return {"status": "failed", "reason": reason}


@command("profile")
def main(cfg: DictConfig) -> dict[str, Any]:
    """Profile as the command line says, and write result.json."""
    job = HydraConfig.get()
    sweeping = job.mode == RunMode.MULTIRUN
    try:
        found = profile(cfg)
    except KeyboardInterrupt:
        if sweeping:
            end_sweep(Path(job.sweep.dir))
        raise
    line = shlex.join(["revnet-profile", *sys.argv[1:]])
    cell = {
        "cell": job.job.num if sweeping else 0,
        "overrides": dict(override.split("=", 1) for override in job.overrides.task if "=" in override),
        **found,
        "config": OmegaConf.to_container(cfg, resolve=True),
        "environment": {**environment(), **found.get("environment", {}), "command": line},
    }
    file = Path(job.runtime.output_dir, "result.json")
    unfinished = file.with_name(".result.json")  # cells side by side read each other's
    unfinished.write_text(json.dumps(cell, indent=2) + "\n")
    unfinished.replace(file)
    if not sweeping:
        if cell["status"] == "failed":
            leave("profile", cell["reason"], status=1)
        print_cell(cell, os.path.relpath(file))
    return cell


if __name__ == "__main__":
    main()
