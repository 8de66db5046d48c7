"""What the code of a module names, from which it is concluded what it may read."""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

__all__ = ["COMPILED", "names_in"]

COMPILED = "_torchdynamo_orig_callable"  # an attribute of what torch.compile makes of a function
_LIBRARIES = ("torch", "numpy", *sys.stdlib_module_names)
_ENGINE = f"{__name__.rpartition('.')[0]}."
_PLAIN = ("torch.nn.modules.", "builtins", _ENGINE)
_of_classes: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()
_of_forwards: weakref.WeakKeyDictionary[Any, frozenset[str]] = weakref.WeakKeyDictionary()
"""Of a `forward` of one instance: keyed by it, as a value that held it would keep it alive, and with it the module."""


def names_in(module: nn.Module) -> frozenset[str]:
    """Names and texts in the methods of a module, and in the functions that these call by name.

    Left out are the methods of `torch.nn.modules` and of this engine, and functions of torch and of Python itself. A
    function that is handed in, or looked up in a table, is not seen. `COMPILED` stands for one that is compiled.
    """
    kind = type(module)
    found = _of_classes.get(kind)
    if found is None:
        own = (base for base in kind.__mro__ if not base.__module__.startswith(_PLAIN))
        found = _of_classes[kind] = _names(member for base in own for member in vars(base).values())
    forward = module.__dict__.get("forward")
    if forward is None:
        return found
    try:
        known = _of_forwards.get(forward)
    except TypeError:  # neither hashed nor referred to weakly
        return found | _names([forward])
    if known is None:
        known = _of_forwards[forward] = _names([forward])
    return found | known


def _names(members: Iterable[Any]) -> frozenset[str]:
    functions = [function for member in members for function in _functions(member)]
    seen: set[FunctionType] = set()
    names: set[str] = set()
    for function in functions:
        if function not in seen:
            seen.add(function)
            here = set().union(*map(_named, _codes(function.__code__)))
            names |= here
            called = [found for value in _reached(function, here) for found in _functions(value)]
            names |= {COMPILED for found in (function, *called) if _is_compiled(found)}
            functions += filter(_is_own, called)
    return frozenset(names)


def _reached(function: FunctionType, names: set[str]) -> Iterator[Any]:
    """What a function may call by these names: of its closure, globals, and the modules and classes among them."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # of one that is still empty
            yield cell.cell_contents
    scopes: list[Any] = [function]
    for scope in scopes:
        known = scope.__globals__ if scope is function else vars(scope)
        for value in map(known.get, names):
            yield value
            with suppress(Exception):  # what stands in for something else may raise anything when it is looked at
                if isinstance(value, ModuleType | type) and _is_own(value) and value not in scopes:
                    scopes.append(value)


def _functions(value: Any) -> Iterator[FunctionType]:
    """The functions behind a member of a class, or a name: those of a property, or that a decorator wraps, too."""
    layers = [value]
    for layer in layers:
        with suppress(Exception):  # see above
            if isinstance(layer, property):
                layers += [layer.fget, layer.fset]
            elif isinstance(layer, staticmethod | classmethod | MethodType):
                layers.append(layer.__func__)
            elif isinstance(layer, functools.partial | functools.partialmethod | functools.cached_property):
                layers.append(layer.func)
            elif callable(layer) and not isinstance(layer, type):
                if isinstance(layer, FunctionType):
                    yield layer
                inner = inspect.getattr_static(layer, "__wrapped__", None)
                if inner is not None and len(layers) < 100:
                    layers.append(inner)


def _is_compiled(function: FunctionType) -> bool:
    return hasattr(function, COMPILED) and not getattr(function, "_torchdynamo_disable", False)


def _is_own(value: Any) -> bool:
    """Whether a function, class or module is none of a library's or of this engine."""
    name = value.__name__ if isinstance(value, ModuleType) else value.__module__ or ""
    return name.partition(".")[0] not in _LIBRARIES and not name.startswith(_ENGINE)


def _codes(code: CodeType) -> list[CodeType]:
    codes = [code]
    for outer in codes:
        codes += [constant for constant in outer.co_consts if isinstance(constant, CodeType)]
    return codes


def _named(code: CodeType) -> set[str]:
    constants = [c for constant in code.co_consts for c in (constant if isinstance(constant, tuple) else (constant,))]
    return {*code.co_names, *(constant for constant in constants if isinstance(constant, str))}
