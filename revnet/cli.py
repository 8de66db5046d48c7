"""What the commands have in common: Hydra around them, and a mistake of the user ends in one line."""

from __future__ import annotations

import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from revnet.arguments import check_overrides
from revnet.mistakes import KILLED, leave, mistake, unplaced, valid
from revnet.processes import leave_group
from revnet.run_directory import claim, forget

__all__ = ["command", "compose"]

FULL_ERROR = "HYDRA_FULL_ERROR"  # Hydra's own switch: 1 lets every exception through, with its traceback
NOISE = (  # Lightning, on its own use of torch and on what is meant so: no validation, resuming where a run stopped
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"Total length of `list` across ranks is zero",
    r"You defined a `validation_step` but have no `val_dataloader`",
    r"`ModelCheckpoint\(monitor='val/(accuracy|bits_per_dim)'\)` could not find the monitored key",
    r"Checkpoint directory .* exists and is not empty",
    r"The dirpath has changed from .*, therefore `best_model_score`",
    r"You're using the WeightAveraging callback with a model that overrides the configure_model",
    r"You requested to overfit but enabled .* shuffling",
    r"Callback KeepRuns\.on_run_start raised Interpolation",  # Hydra, which then raises the same as an error
)


class JobFailed(Exception):
    """A job of a sweep has failed and said so. Unlike most errors it can be sent from one process to another."""


def command(
    config_name: str, prepare: Callable[[], None] | None = None
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make a command out of a function of the composed configuration.

    A mistake of the user (see `mistake`) ends in one line on stderr, and so do Ctrl-C and SIGTERM. The exit status is 2
    if the configuration cannot be composed, 1 if the job refuses it or fails later, 130 at Ctrl-C, 143 at SIGTERM. Any
    other exception keeps its traceback, and with `HYDRA_FULL_ERROR=1` all do. A job of a sweep that fails, in this
    process or in another, says so at once and leaves the others alone; the exit status is 1 in the end.

    Args:
        config_name: the primary configuration in `conf/`; the command is `revnet-CONFIG_NAME`.
        prepare: called before the configuration is composed.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def checked(cfg: DictConfig) -> Any:
            _silence()  # here too: a launcher may run the job in another process
            run = HydraConfig.get()
            if run.mode == RunMode.MULTIRUN:
                claim(Path(run.runtime.output_dir), run.output_subdir)
            with _forgetting():
                _check_places(cfg)
                check_overrides(cfg, run.overrides.task)
                return task(cfg)

        @functools.wraps(task)
        def job(cfg: DictConfig) -> Any:
            os.environ.pop(FULL_ERROR, None)  # set below for this process, not for those that the job starts
            try:
                return checked(cfg)
            except Exception as error:
                line = mistake(error)
                run = HydraConfig.get()
                if run.mode == RunMode.MULTIRUN:
                    if line is None:
                        traceback.print_exc()
                        line = f"{type(error).__name__}: {error}"
                    line = f"{' '.join(run.overrides.task)}: {line}"
                    print(f"revnet-{config_name}: {line}", file=sys.stderr)
                    _let_go(error)
                    raise JobFailed(line) from error
                if line is None:
                    raise
                leave(config_name, line, status=1)
            finally:
                os.environ[FULL_ERROR] = "1"

        def run(function: Callable[[DictConfig], Any]) -> None:
            _silence()
            if prepare is not None:
                prepare()
            hydra.main(config_path="pkg://revnet.conf", config_name=config_name, version_base="1.3")(function)()

        @functools.wraps(task)
        def main() -> None:
            # So that `model._target_=mine.Net` finds a module of the working directory, as with `python -m`.
            if os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())
            _check_flags(config_name)
            if os.environ.get(FULL_ERROR) == "1":
                return run(checked)
            os.environ[FULL_ERROR] = "1"
            try:
                run(job)
                leave_group()
            except KeyboardInterrupt:
                leave(config_name, "interrupted", status=130)
            except JobFailed:
                sys.exit(1)
            except BrokenPipeError:  # whoever read the output, `| head` say, has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(1)
            except SystemExit as stop:
                line, status = _told_to_stop(stop)
                if line is None:
                    raise
                leave(config_name, line, status)
            except Exception as error:
                line = mistake(error)
                if line is None:
                    raise
                leave(config_name, line, status=1 if type(error).__name__ == KILLED else 2)
            finally:
                del os.environ[FULL_ERROR]

        return main

    return decorate


@contextmanager
def _forgetting() -> Iterator[None]:
    """Remove what was written of a run that ends before it has begun, whatever ends it."""
    try:
        yield
    except BaseException:
        run = HydraConfig.get()
        if run.mode != RunMode.MULTIRUN:
            forget(Path(run.runtime.output_dir))
        raise


def _told_to_stop(stop: SystemExit) -> tuple[str | None, int]:
    """What Lightning makes of SIGTERM and of Ctrl-C, which else would look like success, or like a failure."""
    if type(stop).__name__ == "SIGTERMException":
        return "stopped by SIGTERM", 143
    return ("interrupted", 130) if isinstance(stop.__context__, KeyboardInterrupt) else (None, 0)


def _let_go(error: BaseException | None) -> None:
    """Give back what the frames of an error hold: a sweep keeps it to its end, and with it the memory of the job."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _silence() -> None:
    for message in NOISE:
        warnings.filterwarnings("ignore", message)


def _check_places(cfg: DictConfig) -> None:
    """Refuse an experiment whose values would go below `experiment`, where nobody reads them."""
    for group in ("experiment", "debug"):
        if isinstance(cfg.get(group), DictConfig):
            raise ValueError(unplaced(group, HydraConfig.get().runtime.choices[group]))


def _check_flags(config_name: str) -> None:
    """Leave with one line, and not with Hydra's page, where a flag is unknown or misused."""

    def refuse(message: str) -> NoReturn:
        flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
        unknown = message.partition("unrecognized arguments: ")[2].partition(" ")[0]
        leave(config_name, f"{message}; {valid(unknown, flags)}" if unknown else message, status=2)

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args()


def compose(config_name: str, *overrides: str) -> DictConfig:
    """Compose the configuration of a command from Python.

    Args:
        config_name: the primary configuration in `conf/`.
        overrides: as on the command line.

    Returns:
        The configuration without Hydra's own node, every reference resolved.

    Example:
        >>> from revnet.cli import compose
        >>> compose("train", "model=resnet32", "run_dir=here").model.num_classes is None
        True
    """
    with hydra.initialize_config_module("revnet.conf", version_base="1.3"):
        cfg = hydra.compose(config_name, list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    resolved = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    OmegaConf.resolve(resolved)
    return resolved
