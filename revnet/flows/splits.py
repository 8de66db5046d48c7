"""Ways to part a tensor in two halves besides the engine's `Split` by channels, and branches that suit them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from revnet.reversible import Rearrangement, Split

__all__ = ["CheckerboardBranch", "CheckerboardSplit", "DiagonalFirst", "FactorOut", "Flatten", "OddEvenSplit"]


class Flatten(Rearrangement):
    """(B, *shape) -> (B, D), one row an example.

    Args:
        shape: of an example.

    Example:
        >>> import torch
        >>> from revnet.flows import Flatten
        >>> Flatten((1, 4, 4))(torch.randn(2, 1, 4, 4)).shape
        torch.Size([2, 16])
    """

    fixed = True

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor, *, context: Any = None) -> Tensor:
        return x.flatten(1)

    def inverse(self, y: Tensor, *, context: Any = None) -> Tensor:
        """The examples in their shape."""
        return y.unflatten(1, self.shape)

    def extra_repr(self) -> str:
        return f"{self.shape}"


class OddEvenSplit(Rearrangement):
    """x -> (x[:, 0::2], x[:, 1::2]): every other component.

    Source: Dinh, Krueger, Bengio 2014 (NICE), section 5.1.

    Args:
        dim: the dimension to split, of even size.

    Raises:
        ValueError: its size is odd.

    Example:
        >>> import torch
        >>> from revnet.flows import OddEvenSplit
        >>> OddEvenSplit()(torch.arange(6.0)[None])
        (tensor([[0., 2., 4.]]), tensor([[1., 3., 5.]]))
    """

    fixed = True

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, *, context: Any = None) -> tuple[Tensor, Tensor]:
        if x.shape[self.dim] % 2:
            raise ValueError(
                f"cannot split {x.shape[self.dim]} components (dimension {self.dim} of shape {tuple(x.shape)}) into "
                f"every other one: give an even number"
            )
        even, odd = x.unflatten(self.dim, (-1, 2)).unbind(self.dim + 1 if self.dim >= 0 else self.dim)
        return even.contiguous(), odd.contiguous()

    def inverse(self, x1: Tensor, x2: Tensor, *, context: Any = None) -> Tensor:
        """The tensor whose components take turns from x1 and x2."""
        at = self.dim % x1.ndim
        return torch.stack((x1, x2), at + 1).flatten(at, at + 1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class CheckerboardSplit(Rearrangement):
    """x -> (x1, x2), the pixels with i + j even and those with i + j odd, each of shape (B, C, H, W / 2).

    Source: Dinh, Sohl-Dickstein, Bengio 2016 (RealNVP), section 3.4.

    The halves hold the pixels of a row side by side, without gaps: nothing is computed or kept for the other half's
    places. A convolution that shall see where the pixels were needs `CheckerboardBranch`.

    Raises:
        ValueError: the width is odd, so that the halves differ in size.

    Example:
        >>> import torch
        >>> from revnet.flows import CheckerboardSplit
        >>> x1, x2 = CheckerboardSplit()(torch.arange(8.0).view(1, 1, 2, 4))
        >>> x1
        tensor([[[[0., 2.],
                  [5., 7.]]]])
    """

    fixed = True

    def forward(self, x: Tensor, *, context: Any = None) -> tuple[Tensor, Tensor]:
        if x.ndim != 4 or x.shape[-1] % 2:
            raise ValueError(
                f"cannot split a tensor of shape {tuple(x.shape)} by a checkerboard: give images (B, C, H, W) of even "
                f"width"
            )
        left, right = x.unflatten(-1, (-1, 2)).unbind(-1)
        shifted = _odd_rows(x)
        return torch.where(shifted, right, left), torch.where(shifted, left, right)

    def inverse(self, x1: Tensor, x2: Tensor, *, context: Any = None) -> Tensor:
        """The images whose pixels with i + j even are x1."""
        shifted = _odd_rows(x1)
        return torch.stack((torch.where(shifted, x2, x1), torch.where(shifted, x1, x2)), -1).flatten(-2)


def _odd_rows(x: Tensor) -> Tensor:
    """Of shape (H, 1)."""
    return (torch.arange(x.shape[-2], device=x.device) % 2 == 1)[:, None]


class DiagonalFirst(Rearrangement):
    """Reorders the (B, 4 C, H, W) of a squeeze: first each square's pixels on the diagonal, then the two others.

    The halves of the channels are then a checkerboard of the image, each with all colours, and not the first colours
    and the last.

    Source: Dinh, Sohl-Dickstein, Bengio 2016 (RealNVP), the published code (`squeeze_2x2_ordered`).

    Raises:
        ValueError: the number of channels is no multiple of 4.

    Example:
        >>> import torch
        >>> from revnet.flows import DiagonalFirst
        >>> DiagonalFirst()(torch.arange(8.0).view(1, 8, 1, 1)).flatten()
        tensor([0., 4., 3., 7., 1., 5., 2., 6.])
    """

    fixed = True

    def forward(self, x: Tensor, *, context: Any = None) -> Tensor:
        if x.ndim < 2 or x.shape[1] % 4:
            raise ValueError(
                f"cannot reorder a tensor of shape {tuple(x.shape)} by the pixels of squares: give 4 channels for each "
                f"of the image, as Squeeze() makes them"
            )
        first, second, third, fourth = x.unflatten(1, (-1, 4)).unbind(2)
        return torch.cat((first, fourth, second, third), 1)

    def inverse(self, y: Tensor, *, context: Any = None) -> Tensor:
        """The channels in the order of a squeeze."""
        first, fourth, second, third = y.chunk(4, 1)
        return torch.stack((first, second, third, fourth), 2).flatten(1, 2)


class FactorOut(Split):
    """x -> (x1, x2), the halves of the channels: x1 goes on to the next stage of a `Flow`, x2 is a part of its latents.

    Source: Dinh, Sohl-Dickstein, Bengio 2016 (RealNVP), section 3.6.

    Use it at the end of a stage alone, where it says that the stage factors out; elsewhere use `Split`.

    Example:
        >>> import torch
        >>> from revnet.flows import FactorOut
        >>> kept, out = FactorOut()(torch.randn(2, 12, 4, 4))
    """

    def __init__(self) -> None:
        super().__init__(dim=1)


class CheckerboardBranch(nn.Module):
    """A network for whole images as the branch of a coupling between the halves of a `CheckerboardSplit`.

    The network sees the half that stays at its places in the full-resolution image, with zeros at the other half's
    places; of what it returns the values at the other half's places are taken.

    Source: Dinh, Sohl-Dickstein, Bengio 2016 (RealNVP), section 3.4.

    Args:
        network: module from images (B, C, H, W) to a tensor of their size, or a tuple of such.
        swap: that of the coupling: False where the second half stays (and is seen), True where the first does.

    Example:
        >>> import torch
        >>> from revnet import AdditiveCoupling
        >>> from revnet.flows import CheckerboardBranch, CheckerboardSplit
        >>> layer = AdditiveCoupling(CheckerboardBranch(torch.nn.Conv2d(3, 3, 3, padding=1)))
        >>> x1, x2 = CheckerboardSplit()(torch.randn(2, 3, 4, 4))
        >>> layer(x1, x2)[0].shape
        torch.Size([2, 3, 4, 2])
    """

    def __init__(self, network: nn.Module, swap: bool = False) -> None:
        super().__init__()
        self.network = network
        self.swap = swap
        self.places = CheckerboardSplit()

    def forward(self, x: Tensor, context: Any = None) -> Tensor | tuple[Tensor, ...]:
        zeros = torch.zeros_like(x)
        image = self.places.inverse(*((x, zeros) if self.swap else (zeros, x)))
        output = self.network(image) if context is None else self.network(image, context)
        if isinstance(output, Tensor):
            return self._moved(output)
        return tuple(map(self._moved, output))

    def _moved(self, image: Tensor) -> Tensor:
        """The values at the places of the half that the coupling moves."""
        return self.places(image)[int(self.swap)]

    def extra_repr(self) -> str:
        return f"swap={self.swap}"
