"""Overrides held against the arguments of what they configure, before anything is made of them."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from revnet.mistakes import valid

__all__ = ["check_overrides"]

CONFIGURATIONS = Path(__file__).with_name("conf")
NUMBERS = {bool, int, float}


def check_overrides(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse an override that its `_target_` cannot take, which may come to light late or in the words of a library.

    Args:
        cfg: the composed configuration.
        overrides: the command line that it was composed with.

    Raises:
        ValueError: for a name that the target does not know, or text where its type hints ask for a number, or where
            the command's own value is a bool: `no` is text, which would count as true.

    Example:
        >>> from omegaconf import OmegaConf
        >>> from revnet.arguments import check_overrides
        >>> cfg = OmegaConf.create({"optimizer": {"_target_": "torch.optim.SGD", "lr": "fast"}})
        >>> check_overrides(cfg, ["optimizer.lr=fast"])
        Traceback (most recent call last):
        ...
        ValueError: optimizer.lr=fast: give a value of type float or Tensor
    """
    for override in overrides:
        key, equals, _ = override.lstrip("+").partition("=")
        above, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, above) if above else cfg
        if not equals or name.startswith("_") or not isinstance(node, DictConfig) or name not in node:
            continue
        if "_target_" in node:
            try:
                target = get_object(node._target_)
                parameters = inspect.signature(target).parameters
                kinds = list(_kinds(_hint(target, name)))
            except (ImportError, NameError, TypeError, ValueError):
                continue  # it says so itself when it is made; not everything has a signature or hints
            if name not in parameters and all(p.kind != p.VAR_KEYWORD for p in parameters.values()):
                raise ValueError(f"{override}: {node._target_} has no such argument; {valid(name, list(parameters))}")
        else:
            kinds = [bool] if isinstance(_default(key), bool) else []
        if NUMBERS.intersection(kinds) and isinstance(node[name], str) and not _takes(node[name], kinds):
            wanted = dict.fromkeys(map(_name, kinds))
            raise ValueError(f"{override}: give a value of type {' or '.join(wanted)}")


def _hint(target: Any, name: str) -> Any:
    """The type hint of an argument, also where it is passed on: to a base class, or by a builder to what it builds."""
    functions = _initialisers(target)
    if not inspect.isclass(target):
        functions = [target, *_initialisers(get_type_hints(target).get("return"))]
    for function in functions:
        parameters = inspect.signature(function).parameters
        if name in parameters:
            try:
                return get_type_hints(function).get(name, Any)
            except NameError:  # of a hint that is there for type checkers alone
                return bool if isinstance(parameters[name].default, bool) else Any
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return Any


def _initialisers(made: Any) -> list[Callable[..., Any]]:
    """The `__init__` of a class and of its bases, as each calls the next; none for anything else."""
    return [vars(base)["__init__"] for base in getattr(made, "__mro__", ()) if "__init__" in vars(base)]


def _default(key: str) -> Any:
    """What the command's own configuration holds there."""
    name = HydraConfig.get().job.config_name if HydraConfig.initialized() else None
    file = CONFIGURATIONS / f"{name}.yaml"
    own = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else {}
    return own.get(key) if isinstance(own, dict) else None


def _kinds(hint: Any) -> Iterator[Any]:
    """The alternatives of a type hint."""
    if get_origin(hint) in (Union, types.UnionType):
        for alternative in get_args(hint):
            yield from _kinds(alternative)
    else:
        yield hint if get_origin(hint) is Literal else get_origin(hint) or hint


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    names = {bool: "bool (true or false)", type(None): "null"}
    return names[kind] if kind in names else getattr(kind, "__name__", str(kind))


def _takes(text: str, kinds: Sequence[Any]) -> bool:
    return any(
        text in get_args(kind) if get_origin(kind) is Literal else not isinstance(kind, type) or issubclass(str, kind)
        for kind in kinds
    )
