"""The residual networks as a whole: stem, stages, tail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from revnet.models.branches import norm
from revnet.models.units import ResidualUnit, Stage, TransitionUnit
from revnet.reversible import (
    Activations,
    AdditiveCoupling,
    Merge,
    ReversibleBlock,
    ReversibleSequence,
    Split,
    Squeeze,
    Switched,
    set_activations,
)

__all__ = ["FullyReversibleNet", "PreActResNet", "RevNet", "check_squeezable"]


@torch.fx.wrap
def _check_images(x: Tensor, channels: int | None) -> None:
    if x.ndim == 4 and channels not in (None, x.shape[1]):
        raise ValueError(
            f"images of shape {tuple(x.shape)}: this network takes {channels} channels; convert the images or build it "
            f"with in_channels={x.shape[1]}"
        )
    if x.ndim != 4 or min(x.shape[-2:]) < 1:
        raise ValueError(
            f"images of shape {tuple(x.shape)}: this network takes (batch, channels, height, width), with at least one "
            f"pixel"
        )


@torch.fx.wrap
def check_squeezable(x: Tensor, stem_stride: int, total_stride: int) -> None:
    """ValueError, with the remedy, for images that cannot be squeezed to the end."""
    if any(-(-side // stem_stride) % (total_stride // stem_stride) for side in x.shape[-2:]):
        raise ValueError(
            f"images of shape {tuple(x.shape)}: height and width must be multiples of {total_stride}; scale or pad "
            f"them, or build the network with downsampling='strided'"
        )


class PreActResNet(Switched):
    """A pre-activation ResNet: stem, stages of residual units, BN-ReLU, global average pooling, linear layer.

    Source: He et al. 2016 (Identity Mappings in Deep Residual Networks).

    Args:
        stem: channels of the stem.
        stages: what each stage is made of.
        small_images: a 3x3 stem of stride 1 (CIFAR) instead of 7x7 of stride 2 and max-pooling (ImageNet).
        num_classes: size of the output.
        in_channels: channels of the images.
        norm_layer: makes the normalisation of so many channels in stem and tail.
        activations: "store", "recompute" or "reconstruct"; layers without an inverse (here all) are recomputed under
            the last. See `ReversibleSequence`.
        exact: keep the residual stream on a fixed-point grid, so that gradients are equal to the bit under all three
            values of `activations`; None for the default. See `ReversibleSequence`.

    Input (B, in_channels, H, W), output logits (B, num_classes). Children: conv1, bn1, relu, maxpool, layer1, layer2,
    ..., norm, act, avgpool, fc, one after the other the network (with `flatten(1)` ahead of fc). A stage's output is
    the residual stream before any activation; `norm` and `act` are the BN-ReLU of the tail.

    Attributes:
        inplanes: channels of the last stage, as torchvision's detection models ask for them.

    Raises:
        ValueError: `num_classes`, `in_channels`, `activations` or `exact` cannot be; in the forward pass, images of
            another shape.
    """

    default_activations: Activations = "store"
    # Maximum and ReLU commute, and behind the pooling the ReLU keeps a quarter; see `run_stem`.
    stem = ("conv1", "bn1", "maxpool", "relu")
    tail: tuple[str, ...] = ("norm", "act", "avgpool")

    def __init__(
        self,
        stem: int,
        stages: Sequence[Stage],
        *,
        small_images: bool,
        num_classes: int,
        in_channels: int = 3,
        norm_layer: Callable[[int], nn.Module] = norm,
        activations: Activations | None = None,
        exact: bool | None = None,
    ) -> None:
        super().__init__()
        for name, number in {"num_classes": num_classes, "in_channels": in_channels}.items():
            if not isinstance(number, Integral) or number < 1:
                raise ValueError(f"{name}={number!r}: give an integer of at least 1")
        # In the order in which torchvision's ResNets run them, on which its IntermediateLayerGetter relies, and
        # everyone who makes features of `children()`.
        self.conv1 = (
            nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
            if small_images
            else nn.Conv2d(in_channels, stem, 7, stride=2, padding=3, bias=False)
        )
        self.bn1 = norm_layer(stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, stride=2, padding=1)
        self.stem_stride = 1 if small_images else 4
        self.total_stride = self.stem_stride * prod(stage.stride for stage in stages)
        sequences = self._layers(stem, stages)
        self.stage_names = list(sequences)
        for name, layers in sequences.items():
            self.add_module(name, ReversibleSequence(layers, exact=exact))
        self.squeezes = any(isinstance(module, Squeeze) for module in self.modules())
        self.inplanes = stages[-1].channels
        self.norm = norm_layer(self.inplanes)
        self.act = nn.ReLU()  # not in place: what it is given may be the output of the last stage, behind an identity
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.inplanes, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        set_activations(self, self.default_activations if activations is None else activations)

    def _layers(self, stem: int, stages: Sequence[Stage]) -> dict[str, list[nn.Module]]:
        """The layers of each sequence, by name."""
        channels = [stem, *(stage.channels for stage in stages)]
        return {
            f"layer{number}": self._stage(channels[number - 1], stage, first=number == 1)
            for number, stage in enumerate(stages, 1)
        }

    def _stage(self, channels: int, stage: Stage, first: bool) -> list[nn.Module]:
        out = stage.channels
        shortcut = stage.shortcut(channels, out, stage.stride) if stage.is_step(channels) else nn.Identity()
        return [
            ResidualUnit(stage.first_branch(channels, out, preactivate=not first), shortcut),
            *(ResidualUnit(stage.branch(out, out), nn.Identity()) for _ in range(stage.units - 1)),
        ]

    def check_images(self, x: Tensor) -> None:
        """ValueError, with the remedy, for what is no batch of images that this network takes."""
        # Whoever replaces the first layer may put something there that does not say what it takes.
        _check_images(x, getattr(self.conv1, "in_channels", None))
        if self.squeezes:
            check_squeezable(x, self.stem_stride, self.total_stride)

    def run_stem(self, x: Tensor) -> Tensor:
        """The output of the stem, in its children's order where somebody looks at what `relu` and `maxpool` give.

        And where one of them has been replaced: only a maximum and a ReLU commute.
        """
        commute = type(self.relu) is nn.ReLU and type(self.maxpool) in (nn.MaxPool2d, nn.Identity)
        everywhere = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        looked_at = (m._forward_hooks or m._forward_pre_hooks for m in (self.relu, self.maxpool))
        if isinstance(x, torch.fx.Proxy) or not commute or everywhere or any(looked_at):
            return self._run(x, ("conv1", "bn1", "relu", "maxpool"), self.stem_activations)
        return super().run_stem(x)

    def forward(self, x: Tensor) -> Tensor:
        self.check_images(x)
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

    Args: as `PreActResNet`.

    Raises:
        ValueError: as there, and for an odd number of channels in the stem or a stage.

    Example:
        >>> import torch
        >>> from revnet.models import RevNet
        >>> from revnet.models.branches import BasicBranch
        >>> from revnet.models.paper import table_1
        >>> network = RevNet(*table_1(BasicBranch, (2, 2), (16, 16, 32)), small_images=True, num_classes=10)
        >>> network(torch.randn(4, 3, 32, 32)).shape
        torch.Size([4, 10])
    """

    default_activations: Activations = "reconstruct"

    def _stage(self, channels: int, stage: Stage, first: bool) -> list[nn.Module]:
        before, after = _half(channels), _half(stage.channels)
        if stage.is_step(channels):
            start: list[nn.Module] = [
                TransitionUnit(
                    stage.first_branch(before, after, preactivate=not first),
                    stage.shortcut(before, after, stage.stride),
                    stage.shortcut(before, after, stage.stride),
                ),
                AdditiveCoupling(stage.branch(after, after), swap=True),
            ]
        else:
            f = stage.first_branch(after, after, preactivate=not first)
            start = [Split(), ReversibleBlock(f, stage.branch(after, after))]
        return [*start, *_blocks(stage, stage.units - 1), Merge()]


class FullyReversibleNet(PreActResNet):
    """A reversible residual network without transitions: resolution goes down by space-to-depth on the halves.

    One sequence spans all stages, so that under `activations="reconstruct"` not even the states at the stages' borders
    are kept, and the first state follows from the last: `net.layers.inverse(last)`. A stage of stride 2 has 4 times the
    channels of the one before. There are no layer1, layer2, ... to tap features from; where a detection or segmentation
    head wants them, take a `RevNet`.

    Source: Jacobsen, Smeulders, Oyallon 2018 (i-RevNet: Deep Invertible Networks), section 3.

    Args: as `PreActResNet`; the first stage has the channels of the stem.

    Raises:
        ValueError: as there, and for an odd number of channels in a stage; in the forward pass, for images that cannot
            be squeezed to the end.
    """

    default_activations: Activations = "reconstruct"

    def _layers(self, stem: int, stages: Sequence[Stage]) -> dict[str, list[nn.Module]]:
        layers: list[nn.Module] = [Split()]
        for index, stage in enumerate(stages):
            if stage.stride > 1:
                layers.append(Squeeze(stage.stride))
            layers += _blocks(stage, stage.units, preactivate=index > 0)
        return {"layers": [*layers, Merge()]}

    def __getattr__(self, name: str) -> Any:
        if name.removeprefix("layer").isdigit():
            raise AttributeError(
                f"{name}: a fully reversible network is one sequence, `layers`, which keeps no states at its stages' "
                f"borders; to tap features there, build it with downsampling='strided'"
            )
        return super().__getattr__(name)


def _half(channels: int) -> int:
    """Half of the channels of a state."""
    if channels % 2:
        raise ValueError(f"channels={channels} of the stem or a stage: give an even number, for two equal halves")
    return channels // 2


def _blocks(stage: Stage, count: int, preactivate: bool = True) -> list[nn.Module]:
    """Reversible blocks of a stage; `preactivate=False` leaves out the leading BN-ReLU of the first one's F."""
    half = _half(stage.channels)
    return [
        ReversibleBlock(stage.branch(half, half, preactivate=preactivate or index > 0), stage.branch(half, half))
        for index in range(count)
    ]
