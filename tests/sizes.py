"""Which networks the fast tests leave to the slow ones."""

import re
from collections.abc import Collection
from typing import Any

import pytest

LARGE = re.compile(r".*((10|11|15|16)\d|_2)$")  # a hundred layers and more, or twice the width: seconds each


def others_slow(names: Collection[str], fast: Collection[str]) -> list[Any]:
    """Names of networks as parameters of a test, those that are not in `fast` marked `slow`."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def large_ones_slow(names: Collection[str]) -> list[Any]:
    """The same with those of large networks marked `slow`."""
    return others_slow(names, [name for name in names if not LARGE.match(name)])
