"""The fixed-point grid on which subtraction undoes addition to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "GRID",
    "add_on_grid",
    "checksum",
    "check_dtype",
    "is_transformed",
    "subtract_on_grid",
    "to_grid",
]

# Exponent of the grid's step, 2 ** -GRID. A float of p bits holds the multiples of it below 2 ** (p - GRID) exactly.
GRID = {torch.float32: 16, torch.float64: 32}
_ODD = 0x2545F491  # any odd number with half of its bits set
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}

# Where memory matters so many elements are rounded at a time, but never in more than so many pieces. A kernel of an
# accelerator is started at the cost of some millions of elements.
PIECE, PIECE_ON_ACCELERATOR, PIECES = 2**20, 2**23, 16


def check_dtype(x: Tensor) -> None:
    """Raises TypeError for a stream that the grid cannot hold."""
    if x.dtype not in GRID:
        raise TypeError(
            f"the exact mode needs a residual stream of float32 or float64, got {x.dtype}: half precision has no "
            f"digits to spare for a grid; run the branches in half precision by torch.autocast instead, or set "
            f"exact=False"
        )


def to_grid(h: Tensor, dtype: torch.dtype) -> Tensor:
    """`h` in `dtype`, rounded to the nearest multiple of the grid's step; its gradient is passed on, as a copy."""
    if not is_transformed():
        return _ToGrid.apply(h, dtype)
    h = h.to(dtype)
    # Both are exact: the difference has no more digits than h.
    return h + (_rounded(h.detach(), dtype) - h.detach())


def add_on_grid(x: Tensor, h: Tensor, out: Tensor | None = None) -> Tensor:
    """x + h, with h rounded to the grid; its gradient passes straight through.

    `out` may be x itself; nothing of the size of x is then allocated.
    """
    return _on_grid(torch.add, x, h) if out is None else _into(out, torch.add, x, h)


def subtract_on_grid(y: Tensor, h: Tensor, out: Tensor | None = None) -> Tensor:
    """y - h, with h rounded to the grid: undoes `add_on_grid` to the bit where y is within the range.

    `out`: as there.
    """
    return _on_grid(torch.sub, y, h) if out is None else _into(out, torch.sub, y, h)


def _into(out: Tensor, operation: Callable[..., Tensor], x: Tensor, h: Tensor) -> Tensor:
    pieces = min(PIECES, 1 + x.numel() // (PIECE if x.device.type == "cpu" else PIECE_ON_ACCELERATOR))
    for some_x, some_h, some_out in zip(*(t.view(t.shape or (1,)).chunk(pieces) for t in (x, h, out)), strict=True):
        operation(some_x, _steps(some_h, x.dtype), alpha=_step(x.dtype), out=some_out)
    return out


def _on_grid(operation: Callable[..., Tensor], x: Tensor, h: Tensor) -> Tensor:
    if is_transformed():
        return operation(x, to_grid(h, x.dtype))
    if torch.is_grad_enabled():
        return _OnGrid.apply(operation, x, h)
    return _combined(operation, x, h)


def is_transformed() -> bool:
    """Whether something is at work that has to see operators, which it can differentiate or trace."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


class _ToGrid(torch.autograd.Function):
    """Rounding that the gradient passes."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = h.dtype
        ctx.set_materialize_grads(False)
        return _rounded(h, dtype).add_(0.0)  # makes -0 a 0

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        # In memory of its own: leaves take over as their .grad what they are given, and a parameter that a branch adds
        # at its end is given a view of the same.
        return None if grad is None else grad.to(ctx.dtype, copy=True), None


class _OnGrid(torch.autograd.Function):
    """What `to_grid` and the operation do, in two passes over memory less."""

    @staticmethod
    def forward(ctx: Any, operation: Callable[..., Tensor], x: Tensor, h: Tensor) -> Tensor:
        ctx.operation, ctx.dtype = operation, h.dtype
        ctx.set_materialize_grads(False)
        return _combined(operation, x, h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, Tensor | None, Tensor | None]:
        if grad is None:
            return None, None, None
        of_branch = grad.to(ctx.dtype)
        return None, grad, of_branch if ctx.operation is torch.add else -of_branch


def _combined(operation: Callable[..., Tensor], x: Tensor, h: Tensor) -> Tensor:
    steps = _steps(h, x.dtype)
    # Written over the rounded branch where the layout is that of x in any case: one tensor less at the peak.
    return operation(x, steps, alpha=_step(x.dtype), out=steps if steps.stride() == x.stride() else None)


def _step(dtype: torch.dtype) -> float:
    """A power of two, so that products with it are exact, and rounding is all that happens at any |h|."""
    return 2.0 ** -GRID[dtype]


def _steps(h: Tensor, dtype: torch.dtype) -> Tensor:
    """How many steps of the grid make up `h`, rounded: a new tensor."""
    per_unit = 1 / _step(dtype)
    scaled = h * per_unit if h.dtype == dtype else h.to(dtype).mul_(per_unit)
    return scaled.round_()


def _rounded(h: Tensor, dtype: torch.dtype) -> Tensor:
    return _steps(h, dtype).mul_(_step(dtype))


def checksum(state: tuple[Tensor, ...]) -> Tensor:
    """Sums of all bits of the state, and of squares of their mixtures, as integers that wrap around.

    Equal states have equal sums in any layout. The squares are there because errors of one step up and one step down,
    which rounding makes, cancel in a plain sum; the mixtures, because of numbers far below 1 the lower half of the bits
    is 0, and squares of these wrap around to 0.
    """
    sums = []
    for x in state:
        # In the order of memory, whatever the layout: a strided sum of integers is a hundred times slower.
        flat = (x if x.is_contiguous() or x.ndim < 3 else x.movedim(1, -1)).detach().reshape(-1)
        flat = flat + 0.0  # makes -0 a 0: both are the same state
        bits = flat.view(_INTEGER[x.dtype])
        sums.append(bits.sum(dtype=bits.dtype))
        bits = bits.mul_(_ODD).bitwise_xor_(bits >> (bits.dtype.itemsize * 4 - 1))
        sums.append(bits.mul_(bits).sum(dtype=bits.dtype))
    return torch.stack(sums)
