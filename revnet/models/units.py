"""Residual units that cannot be inverted: those of a ResNet, and the transition between two stages of a RevNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from revnet.models.branches import convolution_dtype, subsample
from revnet.reversible import split_halves

__all__ = ["Branch", "PointwiseShortcut", "PoolPadShortcut", "ResidualUnit", "Stage", "TransitionUnit"]

Branch = Callable[..., nn.Module]


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
    """A 1x1 convolution of some stride without bias that keeps for the backward pass only the pixels it reads.

    Attributes:
        keeps_input: keep the whole input instead, where something else keeps it anyway; False by default. Where the
            convolution reads a copy in another dtype it is in vain, and not done.
    """

    keeps_input = False

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        stride = self.stride[0]
        if stride == 1 or (self.keeps_input and convolution_dtype(x) == x.dtype):
            return super().forward(x)
        return F.conv2d(subsample(x, stride).clone(), self.weight)


class Stage(NamedTuple):
    """What a stage of a network is made of.

    Attributes:
        units: how many, the first of which changes width and resolution where they change.
        channels: of the stage's output.
        stride: of the first unit.
        branch: `branch(in_channels, out_channels, stride=1, preactivate=True)` makes a residual branch.
        shortcut: `shortcut(in_channels, out_channels, stride)` makes what takes the identity's place where width or
            resolution change.
        entry: makes the branch that takes that step, if it differs from `branch`.
    """

    units: int
    channels: int
    stride: int
    branch: Branch
    shortcut: Callable[[int, int, int], nn.Module]
    entry: Branch | None = None

    def first_branch(self, in_channels: int, out_channels: int, preactivate: bool) -> nn.Module:
        """The branch that takes the step into the stage."""
        make = self.branch if self.entry is None else self.entry
        return make(in_channels, out_channels, self.stride, preactivate)

    def is_step(self, in_channels: int) -> bool:
        """Whether the stage changes the width `in_channels` or the resolution."""
        return self.stride != 1 or self.channels != in_channels


class ResidualUnit(nn.Module):
    """y = shortcut(x) + F(x), the unit of a pre-activation ResNet.

    Source: He et al. 2016 (Identity Mappings in Deep Residual Networks).
    """

    def __init__(self, f: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.f = f
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.f(x)


def _is_hooked(module: nn.Module) -> bool:
    """Whether a hook may hold what a module returns, or have made a view of it, as backward hooks do."""
    if torch.compiler.is_compiling():
        return False
    everywhere = (
        torch_module._global_forward_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )
    own = (m._forward_hooks or m._backward_hooks or m._backward_pre_hooks for m in module.modules())
    return bool(everywhere) or any(own)


class TransitionUnit(nn.Module):
    """x -> (y1, z) with y1 = shortcut1(x1) + F(x2), z = shortcut2(x2): half of the first unit of a RevNet's stage.

    It changes width or resolution and cannot be inverted. The other half of the unit, y2 = z + G(y1), can: it is the
    `AdditiveCoupling` behind this layer, so that the activations of F and G are never alive at once. It takes the
    undivided tensor, so that what is kept for its second evaluation is the output of the stage before, which that stage
    keeps too, and not a copy of its halves.

    Source: Gomez et al. 2017 and its published code: the stride is in F and both shortcuts, G has stride 1.

    Args:
        f: residual branch between halves, with the stride.
        shortcut1, shortcut2: between halves, of the same stride.
    """

    def __init__(self, f: nn.Module, shortcut1: nn.Module, shortcut2: nn.Module) -> None:
        super().__init__()
        self.f = f
        self.shortcut1 = shortcut1
        self.shortcut2 = shortcut2
        if isinstance(shortcut2, PointwiseShortcut):
            shortcut2.keeps_input = True  # the normalisation in front of F keeps x2

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = split_halves(x)
        y1, z = self.shortcut1(x1), self.shortcut2(x2)
        del x1  # goes here, unless the shortcut keeps it
        # F comes last, so that the backward pass comes to it first and has no gradients of the shortcuts to hold.
        h = self.f(x2)
        # No convolution keeps what it returns, but other layers do, and a hook may.
        free = isinstance(getattr(self.f, "last", None), nn.Conv2d) and not _is_hooked(self.f)
        y1 = h.add_(y1) if free and h.dtype == y1.dtype else y1 + h
        return y1, z
