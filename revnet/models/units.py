"""Residual units that cannot be inverted: those of a ResNet, and the transition between two stages of a RevNet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from revnet.models.branches import BasicBranch, BottleneckBranch, subsample
from revnet.reversible import split_halves

__all__ = ["Branch", "PointwiseShortcut", "PoolPadShortcut", "ResidualUnit", "TransitionUnit", "shortcut"]

Branch = type[BasicBranch] | type[BottleneckBranch]


class PoolPadShortcut(nn.Module):
    """Average pooling over `stride` x `stride`, then zero channels in front and behind: a shortcut without parameters.

    Source: the published code of Gomez et al. 2017. Odd sizes are pooled over what there is at the border, so that the
    result has the size of a strided convolution's.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        extra = out_channels - in_channels
        self.padding = (extra // 2, extra - extra // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        return F.pad(x, (0, 0, 0, 0, *self.padding))


class PointwiseShortcut(nn.Conv2d):
    """A 1x1 convolution of some stride without bias that keeps for the backward pass only the pixels it reads."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, 1, bias=False)
        self.subsampling = stride

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.subsampling == 1 else subsample(x, self.subsampling).clone())


def shortcut(branch: Branch, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Identity where nothing changes; else pooling and padding (basic) or a strided 1x1 convolution (bottleneck)."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if branch is BottleneckBranch:
        return PointwiseShortcut(in_channels, out_channels, stride)
    return PoolPadShortcut(in_channels, out_channels, stride)


class ResidualUnit(nn.Module):
    """y = shortcut(x) + F(x), the unit of a pre-activation ResNet.

    Source: He et al. 2016 (Identity Mappings in Deep Residual Networks).
    """

    def __init__(
        self, branch: Branch, in_channels: int, out_channels: int, stride: int = 1, preactivate: bool = True
    ) -> None:
        super().__init__()
        self.f = branch(in_channels, out_channels, stride, preactivate)
        self.shortcut = shortcut(branch, in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.f(x)


class TransitionUnit(nn.Module):
    """x -> (y1, z) with y1 = shortcut1(x1) + F(x2), z = shortcut2(x2): half of the first unit of a RevNet's stage.

    It changes width or resolution and cannot be inverted. The other half of the unit, y2 = z + G(y1), can: it is the
    `AdditiveCoupling` behind this layer, so that the activations of F and G are never alive at once. It takes the
    undivided tensor, so that what is kept for its second evaluation is the output of the stage before, which that stage
    keeps too, and not a copy of its halves.

    Source: Gomez et al. 2017 and its published code: the stride is in F and both shortcuts, G has stride 1.

    Args:
        branch: `BasicBranch` or `BottleneckBranch`.
        in_channels, out_channels: channels of both halves together, even.
        stride: spatial stride.
        preactivate: False leaves out the leading BN-ReLU of F in the first unit of a network.
    """

    def __init__(
        self, branch: Branch, in_channels: int, out_channels: int, stride: int, preactivate: bool = True
    ) -> None:
        super().__init__()
        before, after = in_channels // 2, out_channels // 2
        self.f = branch(before, after, stride, preactivate)
        self.shortcut1 = shortcut(branch, before, after, stride)
        self.shortcut2 = shortcut(branch, before, after, stride)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = split_halves(x)
        y1 = self.shortcut1(x1)
        del x1  # goes here, unless the shortcut keeps it
        return y1 + self.f(x2), self.shortcut2(x2)
