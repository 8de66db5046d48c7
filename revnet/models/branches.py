"""Pre-activation residual branches: what a residual unit adds to its shortcut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from revnet.reversible.autocast import is_autocast_on
from revnet.reversible.grid import is_transformed
from revnet.reversible.halves import dense_format

__all__ = [
    "BasicBranch",
    "BottleneckBranch",
    "BranchKind",
    "as_convolved",
    "checked_norm",
    "convolution_dtype",
    "conv1x1",
    "conv3x3",
    "norm",
    "subsample",
    "unshared",
]


def norm(channels: int) -> nn.BatchNorm2d:
    """Batch normalisation with the constants of Gomez et al. 2017: eps 1e-3, decay 0.99."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def checked_norm(norm_layer: Callable[[int], nn.Module], channels: int) -> nn.Module:
    """`norm_layer(channels)`; TypeError or ValueError with the name of the argument where that fails."""
    remedy = "give a function from a number of channels, such as nn.BatchNorm2d, to a module"
    if isinstance(norm_layer, nn.Module) or not callable(norm_layer):
        raise TypeError(f"norm_layer={norm_layer!r} is no function; {remedy}")
    try:
        module = norm_layer(channels)
    except (TypeError, ValueError) as error:
        raise ValueError(f"norm_layer={norm_layer!r} fails for {channels} channels: {error}; {remedy}") from error
    if not isinstance(module, nn.Module):
        raise TypeError(f"norm_layer={norm_layer!r} returned {module!r} for {channels} channels; {remedy}")
    return module


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Conv2d:
    """3x3 convolution without bias that keeps the resolution at stride 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(in_channels: int, out_channels: int) -> nn.Conv2d:
    """1x1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


class _Subsample(torch.autograd.Function):
    """A slice whose gradient is laid out as its input.

    That of a plain slice is contiguous, and so is every other on the way back that is summed with it: everything behind
    a step to the next stage would be slower for channels_last.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int) -> Tensor:
        ctx.shape, ctx.stride, ctx.memory_format = x.shape, stride, dense_format(x)
        return x[..., ::stride, ::stride]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if torch._C._functorch.is_legacy_batchedtensor(grad):  # which no ordinary tensor takes in
            whole = grad.new_zeros(ctx.shape)
            whole[..., :: ctx.stride, :: ctx.stride] = grad
            return whole, None
        whole = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.memory_format).zero_()
        whole[..., :: ctx.stride, :: ctx.stride] = grad
        return whole, None


def subsample(x: Tensor, stride: int) -> Tensor:
    """Every `stride`-th pixel, a view: all that a 1x1 convolution of that stride reads of `x`."""
    if isinstance(x, Tensor) and x.requires_grad and not is_transformed():
        return _Subsample.apply(x, stride)
    return x[..., ::stride, ::stride]


def convolution_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution reads `x`, which depends on autocast."""
    if x.dtype == torch.float32 and is_autocast_on(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def as_convolved(x: Tensor) -> Tensor:
    """`x` in the dtype in which convolutions read it.

    Ahead of a ReLU, which commutes with rounding: it then keeps what the convolution reads, and nothing besides. The
    residual stream, and so what the normalisation of a branch returns, is fp32 under autocast.
    """
    return x.to(convolution_dtype(x))


def unshared(h: Tensor, x: Tensor) -> Tensor:
    """`h`, or a copy where it is `x` or a view of it, as behind an identity: a ReLU in place would write there.

    Tensors that are traced do not tell, and compilers leave out a copy that nobody needs.
    """
    if h is x or is_transformed() or h.untyped_storage()._cdata == x.untyped_storage()._cdata:
        return h.clone()
    return h


class BasicBranch(nn.Module):
    """(BN, ReLU, 3x3 convolution) twice.

    Source: He et al. 2016 (Identity Mappings in Deep Residual Networks), figure 4e.

    Args:
        in_channels, out_channels: channels before and after.
        stride: of the first convolution.
        preactivate: False leaves out the leading BN-ReLU, as in the very first unit of a network, whose input the stem
            has just activated.
        width: channels between the convolutions; `out_channels` by default.
        norm_layer: makes the normalisation of so many channels.
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        preactivate: bool = True,
        *,
        width: int | None = None,
        norm_layer: Callable[[int], nn.Module] = norm,
    ) -> None:
        super().__init__()
        width = out_channels if width is None else width
        self.bn1 = norm_layer(in_channels) if preactivate else None
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn2 = norm_layer(width)
        self.conv2 = conv3x3(width, out_channels)
        self.relu = nn.ReLU(inplace=True)

    @property
    def last(self) -> nn.Conv2d:
        """The last convolution: a branch whose last weights are zero is zero."""
        return self.conv2

    def forward(self, x: Tensor) -> Tensor:
        if self.bn1 is not None:
            h = as_convolved(self.bn1(x))
            x = self.relu(unshared(h, x))
        x = self.conv1(x)
        return self.conv2(self.relu(self.bn2(x)))


class BottleneckBranch(nn.Module):
    """BN-ReLU-1x1, BN-ReLU-3x3, BN-ReLU-1x1.

    Source: He et al. 2016 (Identity Mappings in Deep Residual Networks), figure 4e; grouped: Xie et al. 2017
    (Aggregated Residual Transformations).

    Args:
        in_channels, out_channels: channels before and after.
        stride: of the first convolution, taken as `subsample` in front of it, as in the published code of Gomez et al.
            2017; or of the 3x3 convolution with `stride_in_3x3`, as in torchvision's ResNets.
        preactivate: False leaves out the leading BN-ReLU, as in the very first unit of a network.
        width: channels of the 3x3 convolution; a quarter of `out_channels` by default.
        groups, dilation: of the 3x3 convolution.
        norm_layer: makes the normalisation of so many channels.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        preactivate: bool = True,
        *,
        width: int | None = None,
        groups: int = 1,
        dilation: int = 1,
        stride_in_3x3: bool = False,
        norm_layer: Callable[[int], nn.Module] = norm,
    ) -> None:
        super().__init__()
        width = out_channels // self.expansion if width is None else width
        self.bn1 = norm_layer(in_channels) if preactivate else None
        self.stride = 1 if stride_in_3x3 else stride
        self.conv1 = conv1x1(in_channels, width)
        self.bn2 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride if stride_in_3x3 else 1, dilation, groups)
        self.bn3 = norm_layer(width)
        self.conv3 = conv1x1(width, out_channels)
        self.relu = nn.ReLU(inplace=True)

    @property
    def last(self) -> nn.Conv2d:
        """The last convolution: a branch whose last weights are zero is zero."""
        return self.conv3

    def forward(self, x: Tensor) -> Tensor:
        if self.bn1 is not None:
            # The pixels that the convolution passes over are dropped ahead of the ReLU, which then keeps so much less.
            h = as_convolved(self.bn1(x))
            x = self.relu(unshared(h, x)) if self.stride == 1 else relu(subsample(h, self.stride))
        else:
            x = subsample(x, self.stride)
        x = self.conv1(x)
        x = self.conv2(self.relu(self.bn2(x)))
        return self.conv3(self.relu(self.bn3(x)))


BranchKind = type[BasicBranch] | type[BottleneckBranch]
