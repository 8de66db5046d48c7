"""Which networks the fast tests leave to the slow ones."""

import re
from collections.abc import Iterable
from typing import Any

import pytest

LARGE = re.compile(r".*((10|11|15|16)\d|_2)$")  # a hundred layers and more, or twice the width: seconds each


def large_ones_slow(names: Iterable[str]) -> list[Any]:
    """Names of networks as parameters of a test, those of large ones marked `slow`."""
    return [pytest.param(name, marks=pytest.mark.slow) if LARGE.match(name) else name for name in names]
