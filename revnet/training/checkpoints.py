"""Checkpoints, written so that none is lost and read back with care."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from revnet.training.task import Task

__all__ = [
    "AtomicCheckpoints",
    "checkpoint_config",
    "checkpoint_data_state",
    "newest_checkpoint",
    "read_checkpoint",
    "load_checkpoint",
]

log = logging.getLogger(__name__)


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it, so that whatever happens the file there is a whole one.

    (Lightning's own writes into the system's directory of temporary files: moved to another disk that is a copy, and
    what it replaces is lost if it fails.) For the trainer's argument `plugins`.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write the file `path`.

        Raises:
            OSError: it cannot be written, as on a full disk; the error names the path, and the file that was there
                before stays as it was.
        """
        path = Path(path)
        part = path.with_name(f"{path.name}.part")
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            if part.is_file():
                part.unlink()
            line = f"{error.strerror}: no checkpoint could be written, those of before are whole"
            raise OSError(error.errno, line, str(path)) from error


def newest_checkpoint(directory: str | PathLike[str]) -> Path | None:
    """The newest file `*.ckpt` that a training can go on from; one of the best weights only where there is no other.

    A file that cannot be read, as one cut short, is passed over with one line in the log; so is one of weights alone.

    Args:
        directory: where a run puts its checkpoints; it need not exist.

    Returns:
        A path, or None where there is none.
    """
    paths = list(Path(directory).glob("*.ckpt"))
    for path in sorted(paths, key=lambda path: (path.stem.startswith("best"), -path.stat().st_mtime_ns)):
        try:
            found = read_checkpoint(path)
        except ValueError:
            log.warning("%s cannot be read (cut short?) and is passed over", path)
            continue
        if "optimizer_states" in found:
            return path
        log.warning("%s holds weights alone and is passed over", path)
    return None


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint that holds tensors and plain values alone, onto the CPU.

    Args:
        path: a file written by Lightning's trainer.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if the system does not let it be read.
        ValueError: if it is something else than such a checkpoint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"ckpt_path={path}: no such file; runs keep theirs in run_dir/checkpoints")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file torch raises whatever its parsers run into, OSError among it
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(
            f"ckpt_path={path} is not a checkpoint of tensors and plain values alone; give one that "
            f"revnet-train wrote, such as previous.ckpt beside it"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(
            f"ckpt_path={path} is not a checkpoint of a training: it has no 'state_dict'; "
            f"weights alone are given by weights=FILE"
        )
    return checkpoint


def checkpoint_config(checkpoint: Mapping[str, Any], path: str | PathLike[str]) -> dict[str, Any]:
    """How the network and the data of a checkpoint were made, see `Task`, but for weights that it began with.

    Args:
        checkpoint: from `read_checkpoint`.
        path: where it was read, for the error.

    Raises:
        ValueError: it does not say so.
    """
    if "config" not in checkpoint:
        raise ValueError(
            f"ckpt_path={path} does not say how its network and data were made: it has no 'config'; give one that "
            f"revnet-train wrote, or weights=FILE data=... to revnet-eval"
        )
    config = dict(checkpoint["config"])
    if config.get("model", {}).get("weights") is not None:  # the checkpoint has others, and that file may be gone
        config["model"] = {**config["model"], "weights": None}
    return config


def checkpoint_data_state(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint holds of its images: what they were normalised by, and their classes; None if it does not."""
    keys = {"normalization", "shift", "scale"}  # of `revnet.data.ImageDataModule.state_dict`
    return next((value for value in checkpoint.values() if isinstance(value, dict) and keys <= value.keys()), None)


def load_checkpoint(task: Task, checkpoint: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Copy a checkpoint's weights into a network of the same architecture.

    Args:
        task: made from the configuration that is asked for.
        checkpoint: from `read_checkpoint`.
        path: where it was read, for the error.

    Raises:
        ValueError: if the checkpoint holds another architecture or another number of classes; the message says what
            it holds, what was asked for and where the two differ first.
    """
    wanted, held = task.state_dict(), checkpoint["state_dict"]
    for name in [*wanted, *held]:
        here = tuple(wanted[name].shape) if name in wanted else "nothing"
        there = tuple(held[name].shape) if name in held else "nothing"
        if here != there:
            raise ValueError(
                f"ckpt_path={path} holds {_describe(checkpoint.get('config'), held)}, not the "
                f"{_describe(task.config, wanted)} that was asked for: {name} is {there} there and {here} here; "
                f"choose the network and the classes of the checkpoint"
            )
    task.load_state_dict(held)


def _describe(config: Mapping[str, Any] | None, state: Mapping[str, torch.Tensor]) -> str:
    size = f"{sum(tensor.numel() for tensor in state.values()):,} values"
    if config is None:
        return f"unnamed network ({size})"
    model = config["model"]
    shape = model.get("event_shape", model.get("image_shape"))  # of a flow
    fit = f"for {model.get('num_classes')} classes" if shape is None else f"of images {'x'.join(map(str, shape))}"
    return f"{model['_target_'].rpartition('.')[2]} {fit} ({size})"
