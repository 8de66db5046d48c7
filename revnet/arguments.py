"""Overrides held against the arguments of what they configure, before anything is made of them."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from revnet.mistakes import valid

__all__ = ["check_overrides"]

NUMBERS = {bool, int, float}


def check_overrides(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse an override that its `_target_` cannot take, which may come to light late or in the words of a library.

    Args:
        cfg: the composed configuration.
        overrides: the command line that it was composed with.

    Raises:
        ValueError: for a name that the target does not know, or text where its type hints ask for a number.

    Example:
        >>> cfg = OmegaConf.create({"optimizer": {"_target_": "torch.optim.SGD", "lr": "fast"}})
        >>> check_overrides(cfg, ["optimizer.lr=fast"])
        Traceback (most recent call last):
        ...
        ValueError: optimizer.lr=fast: give a value of type float or Tensor
    """
    for override in overrides:
        key, equals, _ = override.lstrip("+").partition("=")
        above, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, above) if above else None
        if not equals or name.startswith("_") or not isinstance(node, DictConfig) or "_target_" not in node:
            continue
        try:
            target = get_object(node._target_)
            parameters = inspect.signature(target).parameters
            hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
        except (ImportError, NameError, TypeError, ValueError):
            continue  # it says so itself when it is made; not everything has a signature or hints
        if name not in parameters and all(p.kind != p.VAR_KEYWORD for p in parameters.values()):
            raise ValueError(f"{override}: {node._target_} has no such argument; {valid(name, list(parameters))}")
        kinds = list(_kinds(hints.get(name, Any)))
        if isinstance(node[name], str) and NUMBERS.intersection(kinds) and not _takes_text(kinds):
            wanted = dict.fromkeys("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"{override}: give a value of type {' or '.join(wanted)}")


def _kinds(hint: Any) -> Iterator[Any]:
    """The alternatives of a type hint."""
    if get_origin(hint) in (Union, types.UnionType):
        for alternative in get_args(hint):
            yield from _kinds(alternative)
    else:
        yield get_origin(hint) or hint


def _takes_text(kinds: Sequence[Any]) -> bool:
    return any(not isinstance(kind, type) or issubclass(str, kind) for kind in kinds)
