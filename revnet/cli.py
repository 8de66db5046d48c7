"""What the commands have in common: Hydra around them, and a mistake of the user ends in one line."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from revnet.mistakes import leave, mistake

__all__ = ["command", "compose"]

FULL_ERROR = "HYDRA_FULL_ERROR"  # Hydra's own switch: 1 lets every exception through, with its traceback
NOISE = (  # Lightning, on its own use of torch and on what is meant so: no validation, resuming where a run stopped
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"Total length of `list` across ranks is zero",
    r"You defined a `validation_step` but have no `val_dataloader`",
    r"`ModelCheckpoint\(monitor='val/accuracy'\)` could not find the monitored key",
    r"Checkpoint directory .* exists and is not empty",
)


def command(
    config_name: str, prepare: Callable[[], None] | None = None
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make a command out of a function of the composed configuration.

    A mistake of the user (see `mistake`) ends in one line on stderr, and so does Ctrl-C. The exit status is 2 if the
    mistake lies in the configuration, 1 if the job came across it, 130 at Ctrl-C. Any other exception keeps its
    traceback, and with `HYDRA_FULL_ERROR=1` all do.

    Args:
        config_name: the primary configuration in `conf/`; the command is `revnet-CONFIG_NAME`.
        prepare: called before the configuration is composed.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        reported: list[BaseException] = []

        @functools.wraps(task)
        def job(cfg: DictConfig) -> Any:
            os.environ.pop(FULL_ERROR, None)  # set below for this process, not for those that the job starts
            try:
                return task(cfg)
            except Exception as error:
                line = mistake(error)
                if line is None:
                    raise
                run = HydraConfig.get()
                if run.mode == RunMode.RUN:
                    leave(config_name, line, status=1)
                # Hydra goes on with the other jobs of the sweep and raises this one again at the end.
                print(f"revnet-{config_name}: {' '.join(run.overrides.task)}: {line}", file=sys.stderr)
                reported.append(error)
                raise
            finally:
                os.environ[FULL_ERROR] = "1"

        def run(function: Callable[[DictConfig], Any]) -> None:
            for message in NOISE:
                warnings.filterwarnings("ignore", message)
            if prepare is not None:
                prepare()
            hydra.main(config_path="pkg://revnet.conf", config_name=config_name, version_base="1.3")(function)()

        @functools.wraps(task)
        def main() -> None:
            if os.environ.get(FULL_ERROR) == "1":
                return run(task)
            os.environ[FULL_ERROR] = "1"
            try:
                run(job)
            except KeyboardInterrupt:
                leave(config_name, "interrupted", status=130)
            except Exception as error:
                if error in reported:
                    sys.exit(1)
                line = mistake(error)
                if line is None:
                    raise
                leave(config_name, line, status=2)
            finally:
                del os.environ[FULL_ERROR]

        return main

    return decorate


def compose(config_name: str, *overrides: str) -> DictConfig:
    """Compose the configuration of a command from Python.

    Args:
        config_name: the primary configuration in `conf/`.
        overrides: as on the command line.

    Returns:
        The configuration without Hydra's own node, every reference resolved.

    Example:
        >>> compose("train", "model=resnet32", "run_dir=here").model.num_classes is None
        True
    """
    with hydra.initialize_config_module("revnet.conf", version_base="1.3"):
        cfg = hydra.compose(config_name, list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    resolved = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    OmegaConf.resolve(resolved)
    return resolved
