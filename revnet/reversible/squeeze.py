"""Space to depth: resolution given for channels, without loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from revnet.reversible.grid import is_transformed
from revnet.reversible.halves import Rearrangement, dense_format
from revnet.reversible.layer import as_output

__all__ = ["Squeeze"]


class _Moved(torch.autograd.Function):
    """`_move`, whose gradient is laid out as it comes: in another layout a convolution adds in another order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int, undo: bool) -> Tensor:
        ctx.factor, ctx.undo = factor, undo
        return _move(x, factor, undo)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _move(grad, ctx.factor, not ctx.undo), None, None


def _move(x: Tensor, factor: int, undo: bool) -> Tensor:
    """Space to depth, or back, in the memory format of `x`, which CUDA's kernels do not keep."""
    moved = pixel_shuffle(x, factor) if undo else pixel_unshuffle(x, factor)
    return moved.contiguous(memory_format=dense_format(x))


def _moved(x: Tensor, factor: int, undo: bool) -> Tensor:
    if torch.is_grad_enabled() and not is_transformed():
        return _Moved.apply(x, factor, undo)
    return _move(x, factor, undo)


class Squeeze(Rearrangement):
    """(C, H, W) -> (factor^2 C, H / factor, W / factor), of one tensor or of each half; log-determinant exactly 0.

    Every channel becomes the factor^2 channels of its pixels at the same place in their square.

    Source: Dinh, Sohl-Dickstein, Bengio 2016 (RealNVP), section 3.6; Jacobsen et al. 2018 (i-RevNet), section 3.1.

    Args:
        factor: side of the square, at least 1.

    Raises:
        ValueError: height or width is no multiple of the factor: it could not be undone.

    Example:
        >>> import torch
        >>> from revnet.reversible import Squeeze
        >>> Squeeze()(torch.randn(2, 3, 4, 6)).shape
        torch.Size([2, 12, 2, 3])
    """

    fixed = True

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor={factor}: give the side of a square of pixels, at least 1")
        self.factor = factor

    def forward(self, *state: Tensor, context: object = None) -> Tensor | tuple[Tensor, ...]:
        for x in state:
            if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
                raise ValueError(
                    f"cannot squeeze images of shape {tuple(x.shape)} by {self.factor}: give height and width that "
                    f"are multiples of {self.factor}"
                )
        return as_output(tuple(_moved(x, self.factor, undo=False) for x in state))

    def inverse(self, *state: Tensor, context: object = None) -> Tensor | tuple[Tensor, ...]:
        """The images that `forward` maps to `state`."""
        return as_output(tuple(_moved(y, self.factor, undo=True) for y in state))

    def extra_repr(self) -> str:
        return f"factor={self.factor}"
