"""The residual networks as a whole: stem, stages, tail."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from revnet.models.branches import norm
from revnet.models.units import Branch, ResidualUnit, TransitionUnit
from revnet.reversible import (
    Activations,
    AdditiveCoupling,
    Merge,
    ReversibleBlock,
    ReversibleSequence,
    Split,
    Switched,
    set_activations,
)

__all__ = ["PreActResNet", "RevNet"]


@torch.fx.wrap
def _check_images(x: Tensor, channels: int, least: int) -> None:
    if x.ndim == 4 and x.shape[1] != channels:
        raise ValueError(
            f"images of shape {tuple(x.shape)}: this network takes {channels} channels; convert the images or build it "
            f"with in_channels={x.shape[1]}"
        )
    if x.ndim != 4 or min(x.shape[-2:]) < least:
        raise ValueError(
            f"images of shape {tuple(x.shape)}: this network takes (batch, channels, height, width) with height and "
            f"width of at least {least}, its total stride; give it larger images or a network for small ones"
        )


class PreActResNet(Switched):
    """A pre-activation ResNet: stem, stages of residual units, BN-ReLU, global average pooling, linear layer.

    Source: He et al. 2016 (Identity Mappings in Deep Residual Networks), as configured by Gomez et al. 2017, table 1.

    Args:
        branch: `BasicBranch` or `BottleneckBranch`; the latter makes the stages 4 times as wide.
        units: residual units of each stage.
        widths: filters of the stem and of each stage, before the factor of the bottleneck.
        small_images: a 3x3 stem of stride 1 (CIFAR) instead of 7x7 of stride 2 and max-pooling (ImageNet).
        num_classes: size of the output.
        in_channels: channels of the images.
        activations: "store", "recompute" or "reconstruct"; layers without an inverse (here all) are recomputed under
            the last. See `ReversibleSequence`.
        exact: keep the residual stream on a fixed-point grid, so that gradients are equal to the bit under all three
            values of `activations`; None for the default. See `ReversibleSequence`.

    Input (B, in_channels, H, W), output logits (B, num_classes). Children: conv1, bn1, relu, maxpool, layer1, layer2,
    ..., norm, avgpool, fc. A stage's output is the residual stream before any activation; `norm` is the BN of the tail.
    """

    default_activations: Activations = "store"
    # Maximum and ReLU commute, and behind the pooling the ReLU keeps a quarter.
    stem = ("conv1", "bn1", "maxpool", "relu")
    tail = ("norm", "relu", "avgpool")

    def __init__(
        self,
        branch: Branch,
        units: Sequence[int],
        widths: Sequence[int],
        *,
        small_images: bool,
        num_classes: int,
        in_channels: int = 3,
        activations: Activations | None = None,
        exact: bool | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1 or in_channels < 1:
            raise ValueError(f"num_classes={num_classes}, in_channels={in_channels}: both must be at least 1")
        stem, *stages = widths
        if small_images:
            self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(in_channels, stem, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = norm(stem)
        self.relu = nn.ReLU(inplace=True)
        self.stage_names = [f"layer{number}" for number in range(1, len(stages) + 1)]
        self.total_stride = (1 if small_images else 4) * 2 ** (len(stages) - 1)
        channels = stem
        for name, count, width in zip(self.stage_names, units, stages, strict=True):
            first = name == "layer1"
            out = width * branch.expansion
            layers = self._stage(branch, count, channels, out, stride=1 if first else 2, first=first)
            setattr(self, name, ReversibleSequence(layers, exact=exact))
            channels = out
        self.norm = norm(channels)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        self._initialise()
        set_activations(self, self.default_activations if activations is None else activations)

    def _stage(
        self, branch: Branch, count: int, in_channels: int, out_channels: int, stride: int, first: bool
    ) -> list[nn.Module]:
        return [
            ResidualUnit(branch, in_channels, out_channels, stride, preactivate=not first)
            if index == 0
            else ResidualUnit(branch, out_channels, out_channels)
            for index in range(count)
        ]

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        _check_images(x, self.conv1.in_channels, self.total_stride)
        x = self.run_stem(x)
        for name in self.stage_names:
            x = getattr(self, name)(x)
        x = self.run_tail(x)
        return self.fc(x.flatten(1))


class RevNet(PreActResNet):
    """A reversible residual network: a `PreActResNet` whose units are reversible but for the first of a stage.

    Under `activations="reconstruct"`, the default, only the images and the output of each stage are kept between the
    forward and the backward pass. For networks that fit into memory as they are, "store" is faster.

    Source: Gomez, Ren, Urtasun, Grosse 2017 (The Reversible Residual Network), section 3 and table 1.

    Args: as `PreActResNet`; all widths even.
    """

    default_activations: Activations = "reconstruct"

    def _stage(
        self, branch: Branch, count: int, in_channels: int, out_channels: int, stride: int, first: bool
    ) -> list[nn.Module]:
        half = out_channels // 2
        if stride == 1 and in_channels == out_channels:
            start: list[nn.Module] = [
                Split(),
                ReversibleBlock(branch(half, half, preactivate=not first), branch(half, half)),
            ]
        else:
            start = [
                TransitionUnit(branch, in_channels, out_channels, stride, preactivate=not first),
                AdditiveCoupling(branch(half, half), swap=True),
            ]
        blocks = [ReversibleBlock(branch(half, half), branch(half, half)) for _ in range(count - 1)]
        return [*start, *blocks, Merge()]
