"""No run overwrites another, and one that goes on has its directory to itself."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from revnet.mistakes import leave
from revnet.processes import agree, rank

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["PLACE", "KeepRuns", "checkpoints_of", "claim", "forget", "records"]


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
        _refuse_home(config, "run_dir", directory)
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
            earlier = records(directory, config.hydra.output_subdir)
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
            leave(config.hydra.job.config_name, f"{line} (hydra/launcher=joblib takes hydra.launcher.n_jobs)", status=2)
        directory = Path(config.hydra.sweep.dir)
        _refuse_home(config, "hydra.sweep.dir", directory)
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


def _refuse_home(config: DictConfig, name: str, directory: Path) -> None:
    if directory.parts[:1] == ("~",):
        line = f"{name}={directory}: nobody expands this ~; write $HOME/{directory.relative_to('~')}"
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


def _is_of_another_run(ckpt_path: str, *places: Path) -> bool:
    """Whether a run that has checkpoints of its own, in these places, is to go on from one that is none of them."""
    own = [place.resolve() for place in places]
    others = ckpt_path != "last" and Path(ckpt_path).resolve().parent not in own
    return others and any(any(place.glob("*.ckpt")) for place in own)


def records(directory: Path, name: str) -> dict[int, Path]:
    """The directories `name`, `name_1`, `name_2` and so on that are there, by their numbers."""
    found = {path: re.fullmatch(rf"{re.escape(name)}(?:_(\d+))?", path.name) for path in directory.glob(f"{name}*")}
    return {int(match[1] or 0): path for path, match in found.items() if match is not None}
