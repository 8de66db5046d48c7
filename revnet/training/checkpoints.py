"""Checkpoints, read back with care."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from revnet.training.classifier import Classifier

__all__ = ["read_checkpoint", "load_weights"]


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint that holds tensors and plain values alone, onto the CPU.

    Args:
        path: a file written by Lightning's trainer.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is something else than such a checkpoint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"ckpt_path={path}: no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"ckpt_path={path} is not a checkpoint of tensors and plain values alone") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"ckpt_path={path} is not a checkpoint of a training: it has no 'state_dict'")
    return checkpoint


def load_weights(classifier: Classifier, checkpoint: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Copy a checkpoint's weights into a classifier of the same architecture.

    Args:
        classifier: made from the configuration that is asked for.
        checkpoint: from `read_checkpoint`.
        path: where it was read, for the error.

    Raises:
        ValueError: if the checkpoint holds another architecture or another number of classes; the message says what
            it holds, what was asked for and where the two differ first.
    """
    wanted, held = classifier.state_dict(), checkpoint["state_dict"]
    for name in [*wanted, *held]:
        here = tuple(wanted[name].shape) if name in wanted else "nothing"
        there = tuple(held[name].shape) if name in held else "nothing"
        if here != there:
            raise ValueError(
                f"ckpt_path={path} holds {_describe(checkpoint.get('config'), held)}, not the "
                f"{_describe(classifier.config, wanted)} that was asked for: {name} is {there} there and {here} here"
            )
    classifier.load_state_dict(held)


def _describe(config: Mapping[str, Any] | None, state: Mapping[str, torch.Tensor]) -> str:
    size = f"{sum(tensor.numel() for tensor in state.values()):,} values"
    if config is None:
        return f"unnamed network ({size})"
    model = config["model"]
    return f"{model['_target_'].rpartition('.')[2]} for {model.get('num_classes')} classes ({size})"
