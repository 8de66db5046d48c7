"""What the commands have in common: a mistake of the user ends in one line, and no run overwrites another."""

from __future__ import annotations

import difflib
import dis
import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

__all__ = ["command", "compose", "mistake", "KeepRuns"]

FULL_ERROR = "HYDRA_FULL_ERROR"  # Hydra's own switch: 1 lets every exception through, with its traceback
PACKAGE = Path(__file__).parent
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

    A mistake of the user (see `mistake`) ends in one line on stderr. The exit status is 2 if it lies in the
    configuration, 1 if the job came across it. Any other exception keeps its traceback, and with `HYDRA_FULL_ERROR=1`
    all do.

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
                    _exit(config_name, line, status=1)
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
            except Exception as error:
                if error in reported:
                    sys.exit(1)
                line = mistake(error)
                if line is None:
                    raise
                _exit(config_name, line, status=2)
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


def _exit(config_name: str, line: str, status: int) -> NoReturn:
    print(f"revnet-{config_name}: {line}", file=sys.stderr)
    sys.exit(status)


class KeepRuns(Callback):
    """Refuse a run or sweep whose directory is there already, before anything is written.

    Resuming (`ckpt_path` is given) goes on in a directory, with a record of its configuration beside the first one. So
    do the processes of a distributed run that are not its first.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Look at the run's directory."""
        HydraConfig.instance().set_config(config)  # the directory's name refers to it
        directory = Path(config.hydra.run.dir)
        if not config.ckpt_path:
            self._refuse(
                config,
                directory,
                f"choose another run_dir, or resume the run with ckpt_path={directory}/checkpoints/last.ckpt",
            )
        elif config.hydra.output_subdir is not None:
            earlier = len(list(directory.glob(f"{config.hydra.output_subdir}*")))
            with read_write(config.hydra):
                config.hydra.output_subdir += f"_{earlier}" if earlier else ""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Look at the sweep's directory."""
        if any(override.startswith("run_dir=") for override in config.hydra.overrides.task):
            line = "run_dir is the directory of one run; hydra.sweep.dir is that of a sweep, whose runs are numbered"
            _exit(config.hydra.job.config_name, line, status=2)
        self._refuse(config, Path(config.hydra.sweep.dir), "choose another hydra.sweep.dir")

    def _refuse(self, config: DictConfig, directory: Path, remedy: str) -> None:
        first = all(os.environ.get(rank, "0") == "0" for rank in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
        if first and directory.is_dir() and any(directory.iterdir()):
            line = f"{directory} is not empty and nothing is written over: {remedy}"
            _exit(config.hydra.job.config_name, line, status=2)


def mistake(error: BaseException) -> str | None:
    """Tell a user's mistake from an error of the program.

    Mistakes are what Hydra and OmegaConf refuse, values that a configured object refuses with a ValueError or
    TypeError, errors of the file system that name a path, and every ValueError, TypeError or FileNotFoundError that
    this package raises on purpose (by a `raise` statement, in this process or in a data loader's worker).

    Returns:
        One line for the user, or None.
    """
    configured = None
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        configured, error = _target(error), error.__cause__
    line = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"unknown {group} {name!r}; {_valid(name, error.options)}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: {error.message.partition(chr(10))[0]}"
    if isinstance(error, HydraException):
        return _unknown_key(error.__cause__) or " ".join(f"{error} {error.__cause__ or ''}".split())
    if isinstance(error, OmegaConfBaseException) or type(error).__name__ == "MisconfigurationException":
        return line
    if isinstance(error, OSError) and error.filename is not None:
        return line
    if isinstance(error, (ValueError, TypeError, FileNotFoundError)):
        if _raised_on_purpose(error):
            return line
        return _worker_mistake(str(error)) or (configured and f"{configured}: {line}")
    if configured and isinstance(error, ImportError):
        return f"{configured}: {line}"
    return None


def _target(error: InstantiationException) -> str:
    key = re.search(r"full_key: (\S+)", str(error))
    target = re.search(r"target '([^']+)'", str(error))
    found = key or target
    return found[1] if found else "configuration"


def _valid(name: str, names: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return "".join([f"did you mean {n!r}? " for n in nearest]) + f"valid: {', '.join(sorted(names))}"


def _unknown_key(cause: BaseException | None) -> str | None:
    if not isinstance(cause, OmegaConfBaseException) or not isinstance(cause.parent_node, DictConfig):
        return None
    names = [str(name) for name in cause.parent_node if name != "hydra" and not str(name).startswith("_")]
    key = str(cause.key)
    if key in names:
        return None
    return f"unknown key {cause.full_key!r}; {_valid(key, names)} (a new key is added by +{cause.full_key}=VALUE)"


def _raised_on_purpose(error: BaseException) -> bool:
    traceback = error.__traceback__
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code: CodeType = traceback.tb_frame.f_code
    instruction = dis.opname[code.co_code[traceback.tb_lasti]]
    return instruction == "RAISE_VARARGS" and Path(code.co_filename).is_relative_to(PACKAGE)


def _worker_mistake(message: str) -> str | None:
    """The mistake in what a data loader says of an error in a worker: a traceback as text, the error at its end."""
    frames = list(re.finditer(r'^  File "(.+)", line \d+, in .+\n +(.+)$', message, re.MULTILINE))
    if not message.startswith("Caught ") or not frames:
        return None
    file, source = frames[-1].groups()
    text = re.search(r"^[\w.]+: (.+)", message[frames[-1].end() :], re.MULTILINE | re.DOTALL)
    if text is None or not source.startswith("raise ") or not Path(file).is_relative_to(PACKAGE):
        return None
    return " ".join(text[1].split())
