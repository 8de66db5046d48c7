"""The networks by name."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, TypeVar

from torch import nn

__all__ = ["get_model", "list_models", "register_model"]

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])
_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register_model(builder: Builder) -> Builder:
    """Decorator: makes a builder known under its own name."""
    _BUILDERS[builder.__name__] = builder
    return builder


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
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown model {name!r}{hint} Valid names: {', '.join(list_models())}")
    return _BUILDERS[name](**arguments)
