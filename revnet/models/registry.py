"""The networks by name."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps
from os import PathLike
from typing import Any, TypeVar

from torch import nn

from revnet.models.weights import load_weights

__all__ = ["get_model", "list_models", "register_model"]

Network = TypeVar("Network", bound=nn.Module)
_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register_model(builder: Callable[..., Network]) -> Callable[..., Network]:
    """Decorator: makes a builder known under its own name, and gives it torchvision's `weights` and `progress`.

    `weights` is a file written by `save_weights`, or None for random ones; `progress` changes nothing, as nothing is
    downloaded. The network knows how it was made: `network.architecture` is the name and the other arguments.

    Raises:
        TypeError: when the builder is called with torchvision's former `pretrained`. Of `weights`, as `load_weights`.
    """
    name = builder.__name__

    @wraps(builder)
    def build(*, weights: str | PathLike[str] | None = None, progress: bool = True, **arguments: Any) -> Network:
        if "pretrained" in arguments:
            raise TypeError(
                f"unexpected keyword argument 'pretrained' ({arguments['pretrained']!r}): no pretrained weights are "
                f"published yet; leave it out, or give weights=PATH, a file of revnet.models.save_weights"
            )
        network = builder(**arguments)
        network.architecture = {"model": name, "arguments": arguments}  # type: ignore[assignment]
        if weights is not None:
            load_weights(network, weights)
        return network

    _BUILDERS[name] = build
    return build


def list_models() -> list[str]:
    """The names that `get_model` takes, sorted.

    Example:
        >>> from revnet.models import list_models
        >>> "revnet38" in list_models()
        True
    """
    return sorted(_BUILDERS)


def get_model(name: str, **arguments: Any) -> nn.Module:
    """The network called `name`, built with the arguments of its builder.

    Raises:
        ValueError: there is no network of that name.

    Example:
        >>> from revnet.models import get_model
        >>> network = get_model("revnet38", num_classes=100)
    """
    if name not in _BUILDERS:
        near = get_close_matches(name, _BUILDERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown model {name!r}; {hint}valid names: {', '.join(list_models())}")
    return _BUILDERS[name](**arguments)
