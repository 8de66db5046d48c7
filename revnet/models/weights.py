"""Weights in files that say which network they belong to."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    import safetensors

__all__ = ["architecture_of", "load_weights", "save_weights"]


def save_weights(network: nn.Module, path: str | PathLike[str]) -> None:
    """Writes the `state_dict` of a network as safetensors, with its architecture in the metadata.

    Args:
        network: from a builder of `revnet.models`. If its `fc` has been replaced by another linear layer, the number of
            classes is that layer's.
        path: the file; one that is there is replaced, when the new one is complete.

    Raises:
        ValueError: the network was not made by a builder of `revnet.models`.
        OSError: the file cannot be written; one that was there before stays as it was.
        ModuleNotFoundError: safetensors is not installed.

    Example:
        >>> import tempfile
        >>> from revnet.models import revnet38, save_weights
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(revnet38(num_classes=7), f"{folder}/weights.safetensors")
        ...     network = revnet38(num_classes=7, weights=f"{folder}/weights.safetensors")
    """
    network = getattr(network, "_orig_mod", network)  # of one that torch.compile has wrapped
    architecture = _plain(getattr(network, "architecture", None))
    if architecture is None:
        raise ValueError(
            f"network: this {type(network).__name__} does not know its architecture; give save_weights what a builder "
            f"of revnet.models has made"
        )
    fc = getattr(network, "fc", None)
    if isinstance(fc, nn.Linear):
        architecture["arguments"]["num_classes"] = fc.weight.shape[0]
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    metadata = {"architecture": json.dumps(architecture, sort_keys=True), "normalisation": _normalisation(network)}
    content = _safetensors().torch.save(state, metadata)
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError:
        if part.is_file():
            part.unlink()
        raise


def architecture_of(path: str | PathLike[str]) -> dict[str, Any]:
    """The architecture that a file of weights is for: `{"model": name, "arguments": {...}}`.

    The arguments are numbers, strings, None, and lists of these; a function or class is named by a string.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: as `load_weights`.
    """
    return _open(path)[0]


def load_weights(network: nn.Module, path: str | PathLike[str]) -> None:
    """Reads weights that `save_weights` wrote into a network of the same names and shapes.

    What leaves names and shapes alone may differ: `activations`, `exact`, `replace_stride_with_dilation`, whether
    batch normalisation is frozen or synchronised.

    Raises:
        FileNotFoundError: there is no such file; no pretrained weights are published yet.
        TypeError: it is no path.
        ValueError: it is no file of `save_weights`, its names or shapes are not the network's (the message names both
            architectures), or its network had another kind of normalisation.
    """
    network = getattr(network, "_orig_mod", network)
    held, file = _open(path)
    weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    there, here = _one_name(file.metadata().get("normalisation", "")), _normalisation(network)
    if there and here and there != here:
        raise _misfit(path, held, network, f"{there} behind the first convolution, here {here}")
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:  # names or shapes differ
        raise _misfit(path, held, network, str(error).splitlines()[1]) from error


def _misfit(path: str | PathLike[str], held: dict[str, Any], network: nn.Module, why: str) -> ValueError:
    own = _plain(getattr(network, "architecture", None))
    reader = f"this {type(network).__name__}" if own is None else _words(own)
    why = shorten(why, 200, placeholder=" ...")
    return ValueError(f"weights={path} are for {_words(held)}, not for {reader}, which was to read them: {why}")


def _open(path: str | PathLike[str]) -> tuple[dict[str, Any], safetensors.safe_open]:
    remedy = "give a file written by revnet.models.save_weights, or leave weights out"
    if not isinstance(path, str | PathLike):
        raise TypeError(f"weights={path!r} is no path, and no pretrained weights are published yet; {remedy}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights={path} is not a file, and no pretrained weights are published yet; {remedy}")
    library = _safetensors()
    try:
        file = library.safe_open(path, "pt")
    except library.SafetensorError as error:
        raise ValueError(f"weights={path} is no safetensors file, or one cut short ({error}); {remedy}") from error
    try:
        architecture = json.loads((file.metadata() or {})["architecture"])
    except (KeyError, ValueError):
        architecture = None
    match architecture:
        case {"model": str(), "arguments": dict(arguments)} if all(map(_is_plain, arguments.values())):
            return architecture, file
    raise ValueError(
        f"weights={path} does not say which network of revnet.models it is for; {remedy}, and load it by "
        f"network.load_state_dict(safetensors.torch.load_file(...))"
    )


def _normalisation(network: nn.Module) -> str:
    """What the first normalisation of a network computes, in words that no version of torch changes."""
    first = getattr(network, "bn1", None)
    settings = [f"{name}={getattr(first, name)}" for name in ("num_groups", "eps") if hasattr(first, name)]
    return "" if first is None else _one_name(f"{type(first).__name__}({', '.join(settings)})")


def _one_name(normalisation: str) -> str:
    """Of batch normalisations that compute the same in evaluation mode."""
    return re.sub("SyncBatchNorm|FrozenBatchNorm2d", "BatchNorm2d", normalisation)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("weights need safetensors: pip install 'revnet[weights]'") from error
    return safetensors


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _plain(value: Any) -> Any:
    """`value` as JSON has it; functions and classes by their name."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):  # a list, a tuple, a Plan
        return [_plain(item) for item in value]
    if _is_plain(value):
        return value
    if hasattr(value, "item"):  # of numpy or torch
        return value.item()
    if isinstance(value, partial):
        given = [*map(str, value.args), *(f"{name}={item}" for name, item in value.keywords.items())]
        return f"{_plain(value.func)}({', '.join(given)})"
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _words(architecture: dict[str, Any]) -> str:
    arguments = ", ".join(f"{name}={value}" for name, value in architecture["arguments"].items())
    return f"{architecture['model']}({arguments})"
