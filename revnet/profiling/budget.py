"""The largest batch that a memory budget allows."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn

from revnet.profiling.estimate import checked_shape, estimate
from revnet.profiling.step import Loss, MakeOptimizer, mean_square

__all__ = ["max_batch", "parse_bytes"]

DECIMAL = {"kB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4}
BINARY = {"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}
UNITS = {"B": 1, **DECIMAL, **BINARY}
GROWTH = 64  # by which factor the next batch that is tried may exceed one that fits


def parse_bytes(size: int | str, name: str = "size") -> int:
    """A number of bytes: an integer, or a number with a unit, as 500MB (10^6 bytes) or "1.5 GiB" (2^30 bytes).

    Args:
        size: the number.
        name: what an error calls it.

    Raises:
        ValueError: it is neither, or not positive.

    Example:
        >>> from revnet.profiling import parse_bytes
        >>> parse_bytes("16GiB"), parse_bytes("500 MB"), parse_bytes(1000)
        (17179869184, 500000000, 1000)
    """
    number = size if type(size) is int else 0
    if isinstance(size, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]+)\s*", size)):
        factors = {unit.lower(): factor for unit, factor in UNITS.items()}
        number = round(float(match[1]) * factors.get(match[2].lower(), 0))
    if number < 1:
        raise ValueError(
            f"{name} must be a positive integer (bytes) or a number with one of the units {', '.join(UNITS)}, such as "
            f"16GiB; got {size!r}"
        )
    return number


def max_batch(
    model: nn.Module,
    input_shape: Sequence[int],
    budget: int | str,
    loss: Loss = mean_square,
    dtype: torch.dtype | None = None,
    optimizer: MakeOptimizer | None = None,
) -> int:
    """The largest batch whose training step takes no more than `budget`, by `estimate(...).total`.

    Args:
        model: any module; it is not changed.
        input_shape: shape of one example, without the batch dimension.
        budget: bytes, or a size with a unit; see `parse_bytes`. Leave part of a device for what an estimate does not
            see: workspaces of convolutions, the fragmentation of the allocator, the CUDA context. On the one GPU that
            was measured that was up to a third of the peak of a reconstructed network.
        loss, dtype, optimizer: as for `estimate`.

    Raises:
        ValueError: not even a batch of 1 fits (of 2 where the network refuses 1, as batch normalisation of single
            values does), or `estimate` refuses model or shape.

    Example:
        >>> from revnet.models import revnet38
        >>> from revnet.profiling import max_batch
        >>> max_batch(revnet38(activations="reconstruct"), (3, 32, 32), "1GB") > 1000
        True
    """
    available, shape = parse_bytes(budget, "budget"), checked_shape("input_shape", input_shape)

    def total(batch: int) -> int:
        return estimate(model, (batch, *shape), loss=loss, dtype=dtype, optimizer=optimizer).total

    def first() -> tuple[int, int]:
        try:
            return 1, total(1)
        except ValueError as refusal:
            try:
                return 2, total(2)
            except ValueError:
                raise refusal from refusal.__cause__

    before, fits = (0, 0), first()
    if fits[1] > available:
        raise ValueError(
            f"budget={budget!r} is too small: a batch of {fits[0]} takes {fits[1]:,} bytes; give at least that much, "
            f"or choose a smaller model or input"
        )
    # Memory grows with the batch, nearly along straight lines: a line through two batches tells where to look next,
    # and now and then the middle is tried, so that the search ends soon for any curve.
    exceeds: tuple[int, int] | None = None
    turn = 0
    while exceeds is None or exceeds[0] - fits[0] > 1:
        if exceeds is None:
            batch = min(max(_on_line(before, fits, available), fits[0] + 2**turn), GROWTH * fits[0])
        elif turn % 3 == 2:
            batch = (fits[0] + exceeds[0]) // 2
        else:
            batch = min(max(_on_line(fits, exceeds, available), fits[0] + 1), exceeds[0] - 1)
        turn += 1
        point = batch, total(batch)
        if point[1] <= available:
            before, fits = fits, point
        else:
            turn, exceeds = (0 if exceeds is None else turn), point
    return fits[0]


def _on_line(first: tuple[int, int], second: tuple[int, int], height: int) -> int:
    """The last integer at which the line through two points (x, y) is not above `height`."""
    (x1, y1), (x2, y2) = first, second
    return x1 + (height - y1) * (x2 - x1) // max(1, y2 - y1)
