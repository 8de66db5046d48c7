"""Weights in files that say which network they belong to."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    import safetensors

__all__ = ["architecture_of", "load_weights", "save_weights"]


def save_weights(network: nn.Module, path: str | PathLike[str]) -> None:
    """Writes the `state_dict` of a network as safetensors, with its architecture in the metadata.

    Args:
        network: from a builder of `revnet.models`.
        path: the file; one that is there is replaced, when the new one is complete.

    Raises:
        ValueError: the network was not made by a builder of `revnet.models`.
        ModuleNotFoundError: safetensors is not installed.

    Example:
        >>> import tempfile
        >>> from revnet.models import revnet38, save_weights
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(revnet38(num_classes=7), f"{folder}/weights.safetensors")
        ...     network = revnet38(num_classes=7, weights=f"{folder}/weights.safetensors")
    """
    architecture = getattr(network, "architecture", None)
    if architecture is None:
        raise ValueError(
            f"network: this {type(network).__name__} does not know its architecture; give save_weights what a builder "
            f"of revnet.models has made"
        )
    path = Path(path)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    partial = path.with_name(path.name + ".partial")
    _safetensors().torch.save_file(state, partial, {"architecture": json.dumps(_plain(architecture), sort_keys=True)})
    partial.replace(path)


def architecture_of(path: str | PathLike[str]) -> dict[str, Any]:
    """The architecture that a file of weights is for: `{"model": name, "arguments": {...}}`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of `save_weights`.
    """
    return _open(path)[0]


def load_weights(network: nn.Module, path: str | PathLike[str]) -> None:
    """Reads weights that `save_weights` wrote into a network of the same names and shapes.

    Raises:
        FileNotFoundError: there is no such file; no pretrained weights are published yet.
        ValueError: it is no file of `save_weights`, or its names or shapes are not the network's; the message names
            both architectures.
    """
    held, file = _open(path)
    weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:  # names or shapes differ
        first = str(error).splitlines()[1].strip()
        raise ValueError(
            f"weights={path} are for {_words(held)}, not for {_words(_plain(network.architecture))}, which was to read "
            f"them: {first}"
        ) from error


def _open(path: str | PathLike[str]) -> tuple[dict[str, Any], safetensors.safe_open]:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"weights={path}: no such file, and no pretrained weights are published yet; give a file written by "
            f"revnet.models.save_weights, or leave weights out"
        )
    library = _safetensors()
    try:
        file = library.safe_open(path, "pt")
        return json.loads((file.metadata() or {})["architecture"]), file
    except (library.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"weights={path} is no file of revnet.models.save_weights: {error}") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("weights need safetensors: pip install 'revnet[weights]'") from error
    return safetensors


def _plain(value: Any) -> Any:
    """`value` as JSON has it; functions and classes by their name."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    function = getattr(value, "func", value)  # of a functools.partial
    return f"{function.__module__}.{function.__qualname__}"


def _words(architecture: dict[str, Any]) -> str:
    arguments = ", ".join(f"{name}={value}" for name, value in architecture["arguments"].items())
    return f"{architecture['model']}({arguments})"
