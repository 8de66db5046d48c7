"""The networks of Gomez, Ren, Urtasun, Grosse 2017 (The Reversible Residual Network), table 1, to the last parameter.

The first six are for CIFAR-size images, the others for 224x224. `preact_resnet50` and `preact_resnet101` are the
paper's ResNets; torchvision's are other networks (post-activation, stride on the 3x3 convolution). Every builder takes
`num_classes`, `in_channels`, `activations` and `exact`, as in `PreActResNet`, and a `norm_layer` for all of the
network; RevNets reconstruct by default, ResNets store.

As in the paper, running statistics take up 1 % of every batch: they mean something after some hundred steps. For a
shorter training, raise the `momentum` of the normalisation, as `revnet-train` does (to 0.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import nn

from revnet.models.branches import BasicBranch, BottleneckBranch, BranchKind, checked_norm, norm
from revnet.models.network import PreActResNet, RevNet
from revnet.models.registry import register_model
from revnet.models.units import PointwiseShortcut, PoolPadShortcut, Stage

__all__ = [
    "preact_resnet50",
    "preact_resnet101",
    "resnet32",
    "resnet110",
    "resnet164",
    "revnet38",
    "revnet56",
    "revnet104",
    "revnet110",
    "revnet164",
    "table_1",
]


Network = TypeVar("Network", PreActResNet, RevNet)


def table_1(
    branch: BranchKind,
    units: Sequence[int],
    widths: Sequence[int],
    norm_layer: Callable[[int], nn.Module] = norm,
) -> tuple[int, list[Stage]]:
    """Channels of the stem, and the stages of a network as table 1 describes it.

    Args:
        branch: `BasicBranch` or `BottleneckBranch`; the latter makes the stages 4 times as wide.
        units: residual units of each stage.
        widths: filters of the stem and of each stage, before the factor of the bottleneck.
        norm_layer: makes the normalisation of so many channels in the branches.
    """
    stem, *filters = widths
    shortcut = PointwiseShortcut if branch is BottleneckBranch else PoolPadShortcut
    made = partial(branch, norm_layer=norm_layer)
    return stem, [
        Stage(count, branch.expansion * width, 1 if index == 0 else 2, made, shortcut)
        for index, (count, width) in enumerate(zip(units, filters, strict=True))
    ]


def _network(
    kind: type[Network],
    branch: BranchKind,
    units: Sequence[int],
    widths: Sequence[int],
    norm_layer: Callable[[int], nn.Module] | None = None,
    **arguments: Any,
) -> Network:
    norm_layer = norm if norm_layer is None else partial(checked_norm, norm_layer)
    return kind(*table_1(branch, units, widths, norm_layer), norm_layer=norm_layer, **arguments)


@register_model
def resnet32(*, num_classes: int = 10, **arguments: Any) -> PreActResNet:
    """ResNet-32: 464,154 parameters with 10 classes."""
    return _network(
        PreActResNet, BasicBranch, (5, 5, 5), (16, 16, 32, 64), small_images=True, num_classes=num_classes, **arguments
    )


@register_model
def resnet110(*, num_classes: int = 10, **arguments: Any) -> PreActResNet:
    """ResNet-110: 1,727,962 parameters with 10 classes."""
    return _network(
        PreActResNet,
        BasicBranch,
        (18, 18, 18),
        (16, 16, 32, 64),
        small_images=True,
        num_classes=num_classes,
        **arguments,
    )


@register_model
def resnet164(*, num_classes: int = 10, **arguments: Any) -> PreActResNet:
    """ResNet-164: 1,703,258 parameters with 10 classes."""
    return _network(
        PreActResNet,
        BottleneckBranch,
        (18, 18, 18),
        (16, 16, 32, 64),
        small_images=True,
        num_classes=num_classes,
        **arguments,
    )


@register_model
def revnet38(*, num_classes: int = 10, **arguments: Any) -> RevNet:
    """RevNet-38: 464,890 parameters with 10 classes."""
    return _network(
        RevNet, BasicBranch, (3, 3, 3), (32, 32, 64, 112), small_images=True, num_classes=num_classes, **arguments
    )


@register_model
def revnet110(*, num_classes: int = 10, **arguments: Any) -> RevNet:
    """RevNet-110: 1,729,194 parameters with 10 classes."""
    return _network(
        RevNet, BasicBranch, (9, 9, 9), (32, 32, 64, 128), small_images=True, num_classes=num_classes, **arguments
    )


@register_model
def revnet164(*, num_classes: int = 10, **arguments: Any) -> RevNet:
    """RevNet-164: 1,748,778 parameters with 10 classes."""
    return _network(
        RevNet, BottleneckBranch, (9, 9, 9), (32, 32, 64, 128), small_images=True, num_classes=num_classes, **arguments
    )


@register_model
def preact_resnet50(*, num_classes: int = 1000, **arguments: Any) -> PreActResNet:
    """ResNet-50 in pre-activation form: 25,549,352 parameters with 1000 classes."""
    return _network(
        PreActResNet,
        BottleneckBranch,
        (3, 4, 6, 3),
        (64, 64, 128, 256, 512),
        small_images=False,
        num_classes=num_classes,
        **arguments,
    )


@register_model
def preact_resnet101(*, num_classes: int = 1000, **arguments: Any) -> PreActResNet:
    """ResNet-101 in pre-activation form: 44,541,480 parameters with 1000 classes."""
    return _network(
        PreActResNet,
        BottleneckBranch,
        (3, 4, 23, 3),
        (64, 64, 128, 256, 512),
        small_images=False,
        num_classes=num_classes,
        **arguments,
    )


@register_model
def revnet56(*, num_classes: int = 1000, **arguments: Any) -> RevNet:
    """RevNet-56: 27,553,128 parameters with 1000 classes."""
    return _network(
        RevNet,
        BottleneckBranch,
        (2, 2, 3, 2),
        (128, 128, 256, 512, 832),
        small_images=False,
        num_classes=num_classes,
        **arguments,
    )


@register_model
def revnet104(*, num_classes: int = 1000, **arguments: Any) -> RevNet:
    """RevNet-104: 45,428,072 parameters with 1000 classes."""
    return _network(
        RevNet,
        BottleneckBranch,
        (2, 2, 11, 2),
        (128, 128, 256, 512, 832),
        small_images=False,
        num_classes=num_classes,
        **arguments,
    )
