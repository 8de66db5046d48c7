"""From one tensor to its two halves and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from revnet.reversible.grid import is_transformed

__all__ = ["Merge", "Rearrangement", "Split", "dense_format", "split_halves"]


def dense_format(x: Tensor) -> torch.memory_format:
    """The dense memory format that `x` is laid out in."""
    # Under vmap, that of `is_grads_batched` too, a tensor does not tell.
    if torch._C._are_functorch_transforms_active() or (
        not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(x)
    ):
        return torch.contiguous_format
    for ndim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.ndim == ndim and x.is_contiguous(memory_format=memory_format) and not x.is_contiguous():
            return memory_format
    return torch.contiguous_format


def split_halves(x: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """The two halves of `x` along `dim`, dense in the memory format of `x`.

    Dense, because a plain `chunk` of a channels_last tensor gives strided halves on which convolutions and
    normalisation take slower paths.

    Raises:
        ValueError: `dim` has an odd size.

    Example:
        >>> import torch
        >>> from revnet.reversible import split_halves
        >>> split_halves(torch.arange(4)[None])
        (tensor([[0, 1]]), tensor([[2, 3]]))
    """
    if x.shape[dim] % 2:
        raise ValueError(
            f"cannot split {x.shape[dim]} channels (dimension {dim} of shape {tuple(x.shape)}) into two equal halves: "
            f"give an even number"
        )
    memory_format = dense_format(x)
    first, second = x.chunk(2, dim)
    return first.contiguous(memory_format=memory_format), second.contiguous(memory_format=memory_format)


class _Concatenation(torch.autograd.Function):
    """torch.cat of two halves whose gradients are dense, each in its own memory.

    Those of torch.cat are views that keep each other alive, and of a channels_last tensor not channels_last.
    """

    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        ctx.set_materialize_grads(False)
        return torch.cat((x1, x2), dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        if grad is None:
            return None, None, None
        return *split_halves(grad, ctx.dim), None


def merge_halves(x1: Tensor, x2: Tensor, dim: int = 1) -> Tensor:
    """The concatenation of two halves along `dim`: undoes `split_halves`, and so do its gradients."""
    if torch.is_grad_enabled() and x1.shape == x2.shape and not is_transformed():
        return _Concatenation.apply(x1, x2, dim)
    return torch.cat((x1, x2), dim)


class Rearrangement(nn.Module):
    """A layer that moves values and changes none: its inverse is exact, at no cost, and its log-determinant 0.

    Gradients are moved back as the values are, so `inverse` must do for both.

    Attributes:
        fixed: says that every call moves values in the same way, whatever has happened in between; they are then moved
            back without a second evaluation. False unless a subclass says so.

    Example:
        >>> import torch
        >>> from revnet.reversible import Rearrangement
        >>> class Mirror(Rearrangement):
        ...     fixed = True
        ...     def forward(self, x1, x2, context=None):
        ...         return x1.flip(-1), x2.flip(-1)
        ...     inverse = forward
        >>> mirror = Mirror()
        >>> mirror.inverse(*mirror(torch.arange(2), torch.arange(3)))
        (tensor([0, 1]), tensor([0, 1, 2]))
    """

    fixed = False


class Split(Rearrangement):
    """x -> (x1, x2), the two halves along `dim`; log-determinant exactly 0. First layer of a sequence on one tensor.

    Args:
        dim: the dimension to split, of even size.

    Example:
        >>> import torch
        >>> from revnet.reversible import Split
        >>> x1, x2 = Split()(torch.randn(2, 6, 4, 4))
        >>> x1.shape
        torch.Size([2, 3, 4, 4])
    """

    fixed = True

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, *, context: object = None) -> tuple[Tensor, Tensor]:
        return split_halves(x, self.dim)

    def inverse(self, x1: Tensor, x2: Tensor, *, context: object = None) -> Tensor:
        """The tensor whose halves are x1 and x2."""
        return merge_halves(x1, x2, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Merge(Rearrangement):
    """(x1, x2) -> x, the concatenation along `dim`: undoes `Split`. Last layer where one tensor is wanted.

    Args:
        dim: the dimension to concatenate along.

    Example:
        >>> import torch
        >>> from revnet.reversible import Merge
        >>> Merge()(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)).shape
        torch.Size([2, 6, 4, 4])
    """

    fixed = True

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x1: Tensor, x2: Tensor, *, context: object = None) -> Tensor:
        return merge_halves(x1, x2, self.dim)

    def inverse(self, x: Tensor, *, context: object = None) -> tuple[Tensor, Tensor]:
        """The two halves of x."""
        return split_halves(x, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
