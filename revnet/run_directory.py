"""No run overwrites another, and one that was stopped goes on in its directory."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf, read_write
from yaml import YAMLError  # type: ignore[import-untyped]

from revnet.mistakes import leave
from revnet.processes import agree, rank

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["KeepRuns", "checkpoints_of", "claim", "forget", "with_saved_overrides"]


PLACE = "callbacks.last.dirpath"  # of the last checkpoints of a training
STILL_GOES_ON = "the run in {} still goes on: wait for its end, or stop it"

_locks: list[int] = []  # file descriptors that this process holds to its end: none or one
_before: dict[str, set[Path]] = {}
"""What was there, of a run's directory and in it, before the run."""


class KeepRuns(Callback):
    """Refuse a run or sweep whose directory is there already, before anything is written.

    Resuming (`ckpt_path` is given) goes on in a directory, with a record of its configuration beside the first one,
    unless the checkpoint is another run's and the directory has some of its own. So do the processes of a distributed
    run that are not its first.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Look at the run's directory."""
        HydraConfig.instance().set_config(config)  # the directory's name refers to it
        directory = Path(config.hydra.run.dir)
        if directory.parts[:1] == ("~",):
            line = f"run_dir={directory}: nobody expands this ~; write $HOME/{directory.relative_to('~')}"
            leave(config.hydra.job.config_name, line, status=2)
        if rank() > 0:
            with read_write(config.hydra):
                config.hydra.run.dir, config.hydra.output_subdir = agree(str(directory)), None
            return
        earlier: dict[int, Path] = {}
        if not config.get("ckpt_path"):
            there = (directory / config.hydra.output_subdir).is_dir() if config.hydra.output_subdir else False
            resume = ", or go on with the run there: ckpt_path=last" if there else ""
            self._refuse(config, directory, f"choose another run_dir{resume}")
        elif _is_of_another_run(config.ckpt_path, directory / "checkpoints", checkpoints_of(config, directory)):
            self._refuse(config, directory, f"go on from {config.ckpt_path} in another run_dir")
        elif config.hydra.output_subdir is not None:
            earlier = _records(directory, config.hydra.output_subdir)
            if earlier and not _lock(earlier[min(earlier)]):
                leave(config.hydra.job.config_name, STILL_GOES_ON.format(directory), status=2)
            with read_write(config.hydra):
                config.hydra.output_subdir += f"_{max(earlier) + 1}" if earlier else ""
        absolute = Path(os.path.abspath(directory))
        _before[str(absolute)] = {absolute, *absolute.rglob("*")} if absolute.exists() else set()
        if config.hydra.output_subdir is not None:
            record = directory / config.hydra.output_subdir
            with self._claiming(config, directory):
                record.mkdir(parents=True)
            if not earlier:
                _lock(record)
        agree(str(directory))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Look at the sweep's directory."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            line = "a sweep (-m) starts each of its runs itself: start it without torchrun, or the runs one by one"
            leave(config.hydra.job.config_name, line, status=2)
        if any(override.startswith("run_dir=") for override in config.hydra.overrides.task):
            line = "run_dir is the directory of one run; hydra.sweep.dir is that of a sweep, whose runs are numbered"
            leave(config.hydra.job.config_name, line, status=2)
        if config.hydra.sweeper.get("max_batch_size") is not None:  # Hydra starts no batch behind a job that failed
            line = "hydra.sweeper.max_batch_size: a job that fails would take later batches along; leave it out"
            leave(config.hydra.job.config_name, f"{line} (hydra.launcher.n_jobs=2: two at a time)", status=2)
        directory = Path(config.hydra.sweep.dir)
        self._refuse(config, directory, "choose another hydra.sweep.dir")
        with self._claiming(config, directory):
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "multirun.yaml").touch(exist_ok=False)  # Hydra fills it

    @contextmanager
    def _claiming(self, config: DictConfig, directory: Path) -> Iterator[None]:
        """Make what only one of several runs that begin in a directory at the same time can, as nobody else has."""
        try:
            yield
        except FileExistsError:
            self._refuse(config, directory, "another run has just begun there, choose another directory")
        except OSError:
            return  # Hydra meets the same when it writes there, and says so

    def _refuse(self, config: DictConfig, directory: Path, remedy: str) -> None:
        if directory.is_dir() and any(directory.iterdir()):
            line = f"{directory} is not empty and nothing is written over: {remedy}"
            leave(config.hydra.job.config_name, line, status=2)


def claim(directory: Path, output_subdir: str | None) -> None:
    """Have a job of a sweep to itself, as `KeepRuns` has a single run, so that nobody goes on with it meanwhile.

    Raises:
        ValueError: another process goes on with it.
    """
    if rank() == 0 and output_subdir is not None and not _lock(directory / output_subdir):
        raise ValueError(STILL_GOES_ON.format(directory))


def _lock(record: Path) -> bool:
    """Whether this process has a run's first record to itself, from now on until it ends, however it ends.

    A lock of the system's, which the processes of a loader do not inherit. Where there is none, nobody is kept off.
    """
    while _locks:  # of an earlier run of this process
        os.close(_locks.pop())
    if fcntl is None:
        return True
    with suppress(OSError):  # of a directory that cannot be written, of which Hydra will speak
        _locks.append(os.open(record / "lock", os.O_RDWR | os.O_CREAT, 0o666))
    try:
        for file in _locks:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def checkpoints_of(config: DictConfig, directory: str | os.PathLike[str]) -> Path:
    """Where the training of a configuration puts its last checkpoints, if not into `checkpoints` of its directory."""
    return Path(OmegaConf.select(config, PLACE) or Path(directory, "checkpoints"))


def with_saved_overrides(arguments: list[str]) -> list[str]:
    """Put what a run was started with before the overrides that are to go on with it.

    With `ckpt_path=last` and `run_dir=PATH` among them, the overrides in the newest record of PATH (`.hydra`, or
    `.hydra_N` of a run that was resumed before) come first, so that they hold again, and those given now on top of
    them; its `--config-dir` holds again, too, unless another is given. The checkpoint is that which the run itself was
    to go on from where it has not come to one of its own. Any other arguments are returned as they are.

    Raises:
        ValueError: there is no such record, or the directory is not given.
    """
    if "ckpt_path=last" not in arguments:
        return arguments
    given = [argument for argument in arguments if argument.startswith("run_dir=")]
    if not given:
        raise ValueError("ckpt_path=last goes on with one run, so its directory is needed: run_dir=runs/NAME/DATE")
    parse = OverridesParser.create().parse_override
    directory = Path(str(parse(given[-1]).value()))
    records = {
        number: record / "overrides.yaml"
        for number, record in _records(directory, ".hydra").items()
        if (record / "overrides.yaml").is_file()
    }
    if not records:
        raise ValueError(f"{given[-1]}: no run was started there (it has no .hydra/overrides.yaml)")
    record = records[max(records)]
    try:
        loaded: Any = OmegaConf.load(record)
    except YAMLError:
        loaded = None
    if not isinstance(loaded, ListConfig):  # what a full disk or a loss of power leaves is no list
        raise ValueError(f"{record} is empty or damaged: give ckpt_path=PATH, and what the run was started with, anew")
    saved = [str(override) for override in loaded]
    again = {argument.partition("=")[0] for argument in arguments}
    origin = [override for override in saved if override.startswith("ckpt_path=") and parse(override).value()]
    moved = [o for o in (*saved, *arguments) if o.lstrip("+").startswith(f"{PLACE}=") and "${" not in o]
    places = [directory / "checkpoints", *(Path(str(parse(o).value())) for o in moved)]
    if origin and not any(any(place.glob("*.ckpt")) for place in places):
        arguments = [origin[-1] if argument == "ckpt_path=last" else argument for argument in arguments]
    saved = [override for override in saved if override.partition("=")[0] not in again]
    flags = get_args_parser().parse_args(arguments)
    first = arguments.index(flags.overrides[0])  # flags may stand before overrides and behind, not in their midst
    directory_of_configs = [] if flags.config_dir else _config_dir(record.with_name("hydra.yaml"))
    return [*directory_of_configs, *arguments[:first], *saved, *arguments[first:]]


def forget(directory: Path) -> None:
    """Remove what was written of a run that was refused before it began.

    That it has, a new `environment*.json` of a training says, or the `result.json` of a measurement.

    Its overrides would hold for the next one that goes on in its directory, and a new directory would be taken.
    """
    before = _before.pop(str(directory), None)
    signs = (*directory.glob("environment*.json"), *directory.glob("result.json"))
    if before is None or any(file not in before for file in signs):
        return
    new = [path for path in directory.rglob("*") if path not in before]
    for path in sorted(new, reverse=True):  # what is in a directory ahead of it
        with suppress(OSError):  # there is an error to be told already
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    if directory not in before:
        with suppress(OSError):
            directory.rmdir()


def _config_dir(record: Path) -> list[str]:
    """The flag that a run was started with, or nothing."""
    sources = OmegaConf.load(record).hydra.runtime.config_sources
    return [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]


def _is_of_another_run(ckpt_path: str, *places: Path) -> bool:
    """Whether a run that has checkpoints of its own, in these places, is to go on from one that is none of them."""
    own = [place.resolve() for place in places]
    others = ckpt_path != "last" and Path(ckpt_path).resolve().parent not in own
    return others and any(any(place.glob("*.ckpt")) for place in own)


def _records(directory: Path, name: str) -> dict[int, Path]:
    """The directories `name`, `name_1`, `name_2` and so on that are there, by their numbers."""
    found = {path: re.fullmatch(rf"{re.escape(name)}(?:_(\d+))?", path.name) for path in directory.glob(f"{name}*")}
    return {int(match[1] or 0): path for path, match in found.items() if match is not None}
