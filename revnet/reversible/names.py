"""What the code of a module names, from which it is concluded what it may do."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import weakref
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

__all__ = ["MATRIX_PRODUCT", "names_in"]

MATRIX_PRODUCT = "@"
_KNOWN = ("torch", "numpy", *sys.stdlib_module_names)
_found: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()


def names_in(module: nn.Module) -> frozenset[str]:
    """Names and texts in the methods of a module, and in the functions that these call by name.

    Those of torch, of this engine and of Python itself are left out. `MATRIX_PRODUCT` is among the names if the
    operator `@` is used. A function that is passed in, or looked up in a table, is not seen.
    """
    kind = type(module)
    found = _found.get(kind)
    if found is None:
        own = (base for base in kind.__mro__ if not _is_known(base.__module__))
        found = _found[kind] = _names(member for base in own for member in vars(base).values())
    if "forward" in module.__dict__:
        return found | _names([module.__dict__["forward"]])
    return found


def _names(members: Iterable[Any]) -> frozenset[str]:
    functions = [function for member in members for function in _functions(member)]
    seen: set[FunctionType] = set()
    names: set[str] = set()
    for function in functions:
        if function in seen:
            continue
        seen.add(function)
        here = set().union(*map(_named, _codes(function.__code__)))
        names |= here
        reached = [function.__globals__.get(name) for name in here]
        reached += [vars(value).get(name) for value in reached if isinstance(value, ModuleType) for name in here]
        reached += [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        functions += [found for value in reached for found in _functions(value)]
    return frozenset(names)


def _functions(value: Any) -> Iterator[FunctionType]:
    """The functions behind a member of a class, or a global name, that are to be looked into."""
    if isinstance(value, property):
        yield from (found for part in (value.fget, value.fset) for found in _functions(part))
        return
    value = getattr(value, "__func__", value)  # of a method, bound, static or of the class
    if isinstance(value, functools.partial | functools.cached_property):
        value = value.func
    if callable(value) and not isinstance(value, type):
        value = inspect.unwrap(value)
    if isinstance(value, FunctionType) and not _is_known(value.__module__ or ""):
        yield value


def _codes(code: CodeType) -> list[CodeType]:
    codes = [code]
    for outer in codes:
        codes += [constant for constant in outer.co_consts if isinstance(constant, CodeType)]
    return codes


def _named(code: CodeType) -> set[str]:
    constants = [c for constant in code.co_consts for c in (constant if isinstance(constant, tuple) else (constant,))]
    names = {*code.co_names, *(constant for constant in constants if isinstance(constant, str))}
    if any(i.argrepr in ("@", "@=") or "MATRIX_MULTIPLY" in i.opname for i in dis.get_instructions(code)):
        names.add(MATRIX_PRODUCT)
    return names


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_known(module: str) -> bool:
    return module.partition(".")[0] in _KNOWN or module.startswith("revnet.reversible.")
