"""RevNets in the place of torchvision's ResNets: stages of the same shapes, the same arguments, the same cost.

| builder | units per stage | inner widths of the branches | parameters | multiply-adds at 224x224 |
| --- | --- | --- | --- | --- |
| `revnet18` | 2-2-2-2 | 64, 120, 240, 472 | 11,688,616 (1.000) | 1.82 G (1.004) |
| `revnet34` | 3-4-6-3 | 64, 120, 248, 488 | 21,671,320 (0.994) | 3.62 G (0.989) |
| `revnet50` | 2-2-3-2 | 64, 168, 312, 528 | 25,586,472 (1.001) | 4.03 G (0.985) |
| `revnet101` | 2-2-11-2 | 64, 168, 312, 528 | 44,752,168 (1.005) | 7.78 G (0.997) |
| `revnet152` | 2-4-18-2 | 64, 160, 304, 528 | 60,852,648 (1.011) | 11.61 G (1.008) |
| `revnext50_32x4d` | 2-2-3-2 | 192, 544, 992, 1568 | 25,429,128 (1.016) | 4.14 G (0.978) |
| `wide_revnet50_2` | 2-2-3-2 | 120, 296, 576, 944 | 69,157,480 (1.004) | 11.36 G (0.997) |

The last two columns have the ratio to the ResNet of the same name in torchvision. A stage has as many units as the
ResNet's (basic branches), or about half as many (bottlenecks, whose two branches have as many layers as two units of
the ResNet). The branch that steps into a stage has the inner width of the ResNet's, since it works at the resolution of
the stage before; the others have that of `matching_width`, the table's.

What somebody who replaces a ResNet should know:

- Branches are pre-activation (BN, ReLU, convolution). What a stage returns is the residual stream, which no BN or ReLU
  has seen yet: it is of both signs and its scale grows with depth. The BN and ReLU behind the last stage are the
  child `norm` and the ReLU in front of `avgpool`; taps at layer1 to layer4 are ahead of them. Heads of detection and
  segmentation that begin with a convolution (FPN, FCN, DeepLabV3) learn the scale; one without normalisation of its own
  trains more easily behind a BN.
- The step between two stages is a strided 1x1 convolution on the way of the identity, as torchvision's, without BN.
- `zero_init_residual` sets the last convolution of every branch to zero, since no BN follows it.

Names in the `state_dict`: conv1.weight, bn1.*, layerS.U.{f,g}.{convN.weight,bnN.*}, norm.*, fc.*. The step into a stage
is layerS.0.{f.*,shortcut1.weight,shortcut2.weight} and layerS.1.branch.*; where there is none, unit 0 has no weights.
They do not change between versions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from math import lcm, log
from numbers import Integral
from typing import Any

from torch import nn

from revnet.models.branches import BasicBranch, BottleneckBranch, BranchKind, checked_norm
from revnet.models.network import FullyReversibleNet, PreActResNet, RevNet
from revnet.models.registry import register_model
from revnet.models.units import PointwiseShortcut, Stage
from revnet.reversible import Activations

BUILDERS = (
    "revnet18",
    "revnet34",
    "revnet50",
    "revnet101",
    "revnet152",
    "revnext50_32x4d",
    "wide_revnet50_2",
)
"""The names of the networks."""

__all__ = ["BUILDERS", "matching_width", *BUILDERS]

STEM = 64
MULTIPLE = 8  # of the inner widths


def inner_width(number: int, groups: int = 1, width_per_group: int = 64) -> int:
    """Inner width of the residual functions in a stage of torchvision's ResNets."""
    return STEM * 2**number * width_per_group // 64 * groups


def matching_width(
    branch: BranchKind,
    number: int,
    units: int,
    resnet_units: int,
    channels: tuple[int, int],
    groups: int = 1,
    width_per_group: int = 64,
) -> int:
    """The inner width at which a stage of a RevNet has the cost of the same stage of torchvision's ResNet.

    The multiple of 8 (and of `groups`) for which the convolutions' multiply-adds (early stages) and weights (late ones)
    are nearest to those of the ResNet's. A unit there has one branch between all channels, here two between half of
    them each. The branch that steps into the stage has the ResNet's own inner width.

    Args:
        branch: `BasicBranch` or `BottleneckBranch`.
        number: of the stage, from 0.
        units, resnet_units: of this network's stage and of the ResNet's.
        channels: of the state ahead of the step into the stage and behind it; equal where there is no such step.
        groups, width_per_group: as in torchvision's ResNets.
    """
    planes = STEM * 2**number
    before, after = STEM if number == 0 else planes // 2 * branch.expansion, planes * branch.expansion
    inner = inner_width(number, groups, width_per_group)
    # Weights are multiply-adds for each pixel, but that a bottleneck's first convolution works ahead of the stride.
    areas = (1, 1 if number == 0 else 4)

    def resnet(area: int) -> int:
        step = before * after if before != after else 0
        others = (resnet_units - 1) * _cost(branch, after, after, inner, groups)
        return _cost(branch, before, after, inner, groups, area) + step + others

    def revnet(area: int, width: int) -> int:
        first, half = channels[0] // 2, channels[1] // 2
        if first == half:
            return 2 * units * _cost(branch, half, half, width, groups)
        step = _cost(branch, first, half, inner, groups, area) + 2 * first * half
        return step + (2 * units - 1) * _cost(branch, half, half, width, groups)

    multiple = lcm(MULTIPLE, groups)
    widths = range(multiple, 4 * channels[1] + multiple, multiple)
    # A network's weights are in its late stages, its multiply-adds in all: so the early ones look at the latter alone.
    shares = (number / 3, 1 - number / 3)

    def distance(width: int) -> float:
        ratios = (revnet(area, width) / resnet(area) for area in areas)
        return abs(sum(share * log(ratio) for share, ratio in zip(shares, ratios, strict=True)))

    return min(widths, key=distance)


def _cost(branch: BranchKind, before: int, after: int, width: int, groups: int, area: int = 1) -> int:
    """Multiply-adds of a branch's convolutions for each pixel behind it, where `area` pixels are ahead of it."""
    if branch is BasicBranch:
        return 9 * before * width + 9 * width * after
    return area * before * width + 9 * width * width // groups + width * after


def _revnet(
    branch: BranchKind,
    units: Sequence[int],
    resnet_units: Sequence[int],
    *,
    num_classes: int = 1000,
    zero_init_residual: bool = False,
    groups: int = 1,
    width_per_group: int = 64,
    replace_stride_with_dilation: Sequence[bool] | None = None,
    norm_layer: Callable[[int], nn.Module] | None = None,
    small_images: bool = False,
    downsampling: str = "strided",
    in_channels: int = 3,
    activations: Activations | None = None,
    exact: bool | None = None,
    **unknown: Any,
) -> PreActResNet:
    _refuse(unknown)
    for name, number in {"groups": groups, "width_per_group": width_per_group}.items():
        if not isinstance(number, Integral) or number < 1:
            raise ValueError(f"{name}={number!r}: give an integer of at least 1")
    if branch is BasicBranch and (groups != 1 or width_per_group != 64):
        raise ValueError(
            f"groups={groups}, width_per_group={width_per_group}: networks of basic branches have groups=1 and "
            f"width_per_group=64 only; take revnet50 or a larger one"
        )
    given = (False, False, False) if replace_stride_with_dilation is None else replace_stride_with_dilation
    if not isinstance(given, Sequence) or len(given) != 3 or any(value not in (False, True) for value in given):
        raise ValueError(
            f"replace_stride_with_dilation={replace_stride_with_dilation!r}: give three values of False or True, for "
            f"layer2 to layer4"
        )
    dilate = (False, *given)
    if downsampling not in ("strided", "space_to_depth"):
        raise ValueError(f"downsampling={downsampling!r}: give 'strided' or 'space_to_depth'")
    reversible = downsampling == "space_to_depth"
    if any(dilate) and (reversible or branch is BasicBranch):
        what = "downsampling='space_to_depth' has no strides" if reversible else "basic branches are not dilated"
        raise ValueError(
            f"replace_stride_with_dilation={replace_stride_with_dilation}: {what}; leave it out, or take revnet50 or a "
            f"larger one with downsampling='strided'"
        )
    norm_layer = nn.BatchNorm2d if norm_layer is None else partial(checked_norm, norm_layer)
    stages, channels, dilation = [], STEM, 1
    for number, (count, theirs, dilated) in enumerate(zip(units, resnet_units, dilate, strict=True)):
        out = STEM * 4**number if reversible else STEM * 2**number * branch.expansion
        before = out if reversible else channels
        width = matching_width(branch, number, count, theirs, (before, out), groups, width_per_group)
        options: dict[str, Any] = {"width": width, "norm_layer": norm_layer}
        entry = options if before == out else options | {"width": inner_width(number, groups, width_per_group)}
        stride = 1 if number == 0 or dilated else 2
        if branch is BottleneckBranch:
            # The first branch still reads the grid of the stage before, so it keeps that stage's dilation.
            entry = entry | {"groups": groups, "stride_in_3x3": True, "dilation": dilation}
            dilation *= 2 if dilated else 1
            options = options | {"groups": groups, "dilation": dilation}
        stages.append(
            Stage(count, out, stride, partial(branch, **options), PointwiseShortcut, partial(branch, **entry))
        )
        channels = out
    kind = FullyReversibleNet if reversible else RevNet
    network = kind(
        STEM,
        stages,
        small_images=small_images,
        norm_layer=norm_layer,
        activations=activations,
        exact=exact,
        num_classes=num_classes,
        in_channels=in_channels,
    )
    if zero_init_residual:
        for module in network.modules():
            if isinstance(module, branch):
                nn.init.zeros_(module.last.weight)
    return network


def _refuse(unknown: dict[str, Any]) -> None:
    """TypeError for the first argument that no builder of the family knows."""
    for name in unknown:
        valid = sorted([*(_revnet.__kwdefaults__ or ()), "weights", "progress"])
        near = "".join(f"did you mean {close!r}? " for close in get_close_matches(name, valid, n=1))
        raise TypeError(f"unexpected keyword argument {name!r}; {near}valid: {', '.join(valid)}")


@register_model
def revnet18(**arguments: Any) -> PreActResNet:
    """RevNet in the place of torchvision's resnet18."""
    return _revnet(BasicBranch, (2, 2, 2, 2), (2, 2, 2, 2), **arguments)


@register_model
def revnet34(**arguments: Any) -> PreActResNet:
    """RevNet in the place of torchvision's resnet34."""
    return _revnet(BasicBranch, (3, 4, 6, 3), (3, 4, 6, 3), **arguments)


@register_model
def revnet50(**arguments: Any) -> PreActResNet:
    """RevNet in the place of torchvision's resnet50.

    Args:
        weights: a file of `save_weights`; no pretrained weights are published yet.
        progress: taken for the sake of torchvision's callers; nothing is downloaded.
        num_classes, zero_init_residual, groups, width_per_group, replace_stride_with_dilation, norm_layer: as in
            torchvision's ResNets. Groups and widths are those of the ResNet, from which the inner widths here follow:
            multiples of 8, so that a `GroupNorm` has 8 groups, say, and not 32.
        small_images: a 3x3 stem of stride 1 without max-pooling, for images of 32x32, say.
        downsampling: "strided", or "space_to_depth" for a `FullyReversibleNet`: one sequence spans all stages, whose
            states have 64, 256, 1024 and 4096 channels.
        in_channels, activations, exact: as in `RevNet`.

    Raises:
        ValueError: a value that cannot be, or arguments that exclude each other.

    Example:
        >>> import torch
        >>> from revnet.models import revnet50
        >>> network = revnet50(num_classes=10)
        >>> network.layer1(torch.randn(1, 64, 8, 8)).shape
        torch.Size([1, 256, 8, 8])
    """
    return _revnet(BottleneckBranch, (2, 2, 3, 2), (3, 4, 6, 3), **arguments)


@register_model
def revnet101(**arguments: Any) -> PreActResNet:
    """RevNet in the place of torchvision's resnet101; arguments as in `revnet50`."""
    return _revnet(BottleneckBranch, (2, 2, 11, 2), (3, 4, 23, 3), **arguments)


@register_model
def revnet152(**arguments: Any) -> PreActResNet:
    """RevNet in the place of torchvision's resnet152; arguments as in `revnet50`."""
    return _revnet(BottleneckBranch, (2, 4, 18, 2), (3, 8, 36, 3), **arguments)


@register_model
def revnext50_32x4d(*, groups: int = 32, width_per_group: int = 4, **arguments: Any) -> PreActResNet:
    """RevNet in the place of torchvision's resnext50_32x4d; arguments as in `revnet50`."""
    return revnet50(groups=groups, width_per_group=width_per_group, **arguments)


@register_model
def wide_revnet50_2(*, width_per_group: int = 128, **arguments: Any) -> PreActResNet:
    """RevNet in the place of torchvision's wide_resnet50_2; arguments as in `revnet50`."""
    return revnet50(width_per_group=width_per_group, **arguments)
