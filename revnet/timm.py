"""The family as models of timm: importing this module makes timm's `create_model` know `revnet50` and its kin.

Nothing else in the package imports it. A script that asks timm for one of the names imports it first.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revnet.models import PreActResNet, family, load_weights
from revnet.models.units import PointwiseShortcut
from revnet.reversible import Activations, ReversibleSequence

try:
    from timm.layers import SelectAdaptivePool2d
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
    from timm.models._features import FeatureGetterNet, feature_take_indices
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("revnet.timm needs timm: pip install 'revnet[timm]'") from error

__all__ = [
    "TimmRevNet",
    "revnet18",
    "revnet34",
    "revnet50",
    "revnet101",
    "revnet152",
    "revnext50_32x4d",
    "wide_revnet50_2",
]

DILATED = {32: (False, False, False), 16: (False, False, True), 8: (False, True, True)}  # stages, by output stride

default_cfgs = generate_default_cfgs(
    {
        name: {
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "first_conv": "conv1",
            "classifier": "fc",
            "license": "mit",
        }
        for name in family.BUILDERS
    }
)


class TimmRevNet(PreActResNet):
    """A network of the family with the methods that timm expects of its models.

    The features of `forward_intermediates`, and so of `features_only=True`, are those of timm's ResNets: the activated
    stem ahead of the pooling, at index 0, then the outputs of layer1 to layer4. The latter are the residual stream,
    which no BN or ReLU has seen yet; `norm=True` applies those of the tail to the last one.

    Args:
        network: from a builder of the family; its parts become this network's.
        num_classes: size of the output; 0 for pooled features without a linear layer.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for none.
        drop_rate: of the dropout in front of the linear layer.

    Attributes:
        feature_info: channels (`num_chs`), stride (`reduction`) and child (`module`) of each feature.
        num_features: channels of `forward_features`.
        head_hidden_size: channels behind the pooling.
    """

    default_activations: Activations = "reconstruct"
    tail: tuple[str, ...] = ("norm", "act")
    architecture: dict[str, Any]
    global_pool: SelectAdaptivePool2d
    fc: Any

    def __init__(self, network: PreActResNet, num_classes: int, global_pool: str, drop_rate: float) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(network))
        del self.avgpool, self.fc  # to stand in timm's order, in which children are the features of the network
        self.in_chans = self.conv1.in_channels
        self.drop_rate = drop_rate
        self.feature_info = _feature_info(self)
        self.num_features = self.inplanes
        self.reset_classifier(num_classes, global_pool)

    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The linear layer, or its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a new linear layer, or none for `num_classes=0`, behind the present pooling or that of `global_pool`."""
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool = SelectAdaptivePool2d(pool_type=pool, flatten=bool(pool)).train(self.training)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        like = next(self.parameters())
        self.fc = (
            nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        ).train(self.training)
        self.num_classes = num_classes
        self.architecture["arguments"]["num_classes"] = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes what is stored, and stores again what is recomputed with `enable=False`.

        What is reconstructed, as everything is by default, stays as it is: it keeps less than checkpoints do. A plan
        stays, too.
        """
        before, after = ("store", "recompute") if enable else ("recompute", "store")
        for module in self.modules():
            if isinstance(module, ReversibleSequence) and module.activations == before:
                module.activations = after
        if self.stem_activations == before:
            self.stem_activations = after
        if self.tail_activations == before:
            self.tail_activations = after

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of the parameters' names for layer-wise learning rates: the stem, then each stage or layer."""
        one_level = coarse or self.stage_names == ["layers"]
        return {"stem": r"^conv1|bn1", "blocks": r"^layer\D*(\d+)" + ("" if one_level else r"\.(\d+)")}

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The features in front of the pooling, behind the BN and ReLU of the tail."""
        return self.forward_intermediates(x, indices=1)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The logits for what `forward_features` returns, or with `pre_logits` the input of the linear layer."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """What `forward_features` returns, and a list of intermediate features.

        Under "reconstruct" the outputs of the stages cost no memory, as they are kept anyway; the stem's does.

        Args:
            indices: of the features, in `feature_info`; a number for so many last ones, None for all.
            norm: apply the BN and ReLU of the tail to the feature of the last stage.
            stop_early: go no further than the last feature asked for, which is then also the first result.
            output_fmt: "NCHW".
            intermediates_only: return the list alone.

        Raises:
            ValueError: another `output_fmt`, or images that this network does not take.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: these networks have features of the form 'NCHW' only")
        self.check_images(x)
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        intermediates = []
        if 0 in wanted:
            x = self._run(x, ("conv1", "bn1", "relu"), self.stem_activations)
            intermediates.append(x)
            if last or not stop_early:
                x = self._run(x, ("maxpool",), self.stem_activations)
        else:
            x = self.run_stem(x)
        names = self.stage_names[:last] if stop_early else self.stage_names
        for number, name in enumerate(names, 1):
            x = getattr(self, name)(x)
            if number in wanted:
                intermediates.append(x)
        if len(names) == len(self.stage_names) and (norm or not intermediates_only):
            x = self.run_tail(x)
            if norm and len(names) in wanted:
                intermediates[-1] = x
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages that no feature of these indices needs, and returns the indices, none of them negative.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm, prune_head: drop the BN and ReLU of the tail, and the pooling and linear layer, too; they always
                go with the last stage.
        """
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        ends = last < len(self.stage_names)
        for name in self.stage_names[last:]:
            delattr(self, name)
        self.stage_names = self.stage_names[:last]
        if last == 0:
            self.maxpool = nn.Identity()  # it follows the feature
        if prune_norm or ends:
            self.norm = nn.Identity()
            self.tail = ()
        if ends:
            self.num_features = self.inplanes = self.feature_info[last]["num_chs"]
            self.total_stride = self.feature_info[last]["reduction"]
            self.squeezes = False
        if prune_head or ends:
            self.reset_classifier(0, "")
        return wanted


def _feature_info(network: PreActResNet) -> list[dict[str, Any]]:
    """Channels, stride and child of each feature, from the last to the first: a stage doubles the channels."""
    features = []
    channels, reduction = network.inplanes, network.total_stride
    for name in reversed(network.stage_names):
        features.append({"num_chs": channels, "reduction": reduction, "module": name})
        shortcuts = (m for m in network.get_submodule(name).modules() if isinstance(m, PointwiseShortcut))
        channels //= 2
        reduction //= next((shortcut.stride[0] for shortcut in shortcuts), 1)
    stem = network.conv1
    features.append({"num_chs": stem.out_channels, "reduction": stem.stride[0], "module": "relu"})
    return features[::-1]


def _build(
    name: str,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    weights: Any = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
    output_stride: int = 32,
    drop_path_rate: float = 0.0,
    zero_init_last: bool = False,
    **arguments: Any,
) -> TimmRevNet:
    if "in_channels" in arguments:
        raise TypeError("unexpected keyword argument 'in_channels'; timm calls it in_chans")
    if drop_path_rate:
        raise ValueError(f"drop_path_rate={drop_path_rate}: these networks have no stochastic depth; leave it out")
    if output_stride not in DILATED:
        raise ValueError(f"output_stride={output_stride}: give one of {', '.join(map(str, DILATED))}")
    if output_stride < 32:
        own = [key for key in ("small_images", "replace_stride_with_dilation") if arguments.get(key)]
        if own:
            raise ValueError(f"output_stride={output_stride}, {own[0]}={arguments[own[0]]}: give one of them")
        if name in ("revnet18", "revnet34") or arguments.get("downsampling") == "space_to_depth":
            raise ValueError(
                f"output_stride={output_stride}: basic branches and downsampling='space_to_depth' are not dilated; "
                f"leave it out, or take revnet50 or a larger one"
            )
        arguments["replace_stride_with_dilation"] = DILATED[output_stride]
    if zero_init_last:
        arguments["zero_init_residual"] = True
    with nullcontext() if device is None else torch.device(device):
        network = getattr(family, name)(num_classes=max(num_classes, 1), in_channels=in_chans, **arguments)
    model = TimmRevNet(network.to(dtype=dtype), num_classes, global_pool, drop_rate)
    if weights is not None:
        load_weights(model, weights)
    return model


def _create(name: str, pretrained: bool, **arguments: Any) -> nn.Module:
    if arguments.get("features_only"):
        if arguments.get("downsampling") == "space_to_depth":
            raise ValueError(
                "features_only=True, downsampling='space_to_depth': a fully reversible network is one sequence without "
                "stages to take features from; leave one of them out"
            )
        taps = arguments.setdefault("feature_cls", "getter")
        if taps not in ("getter", FeatureGetterNet):
            raise ValueError(
                f"feature_cls={taps!r}: the features are those of `forward_intermediates`, which the reversible engine "
                f"computes; leave it out, or give 'getter'"
            )
    return build_model_with_cfg(partial(_build, name), name, pretrained, **arguments)


@register_model
def revnet18(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """RevNet in the place of timm's resnet18; arguments as in `revnet50`."""
    return _create("revnet18", pretrained, **arguments)


@register_model
def revnet34(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """RevNet in the place of timm's resnet34; arguments as in `revnet50`."""
    return _create("revnet34", pretrained, **arguments)


@register_model
def revnet50(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """RevNet in the place of timm's resnet50.

    Args:
        pretrained: no weights are published; True is for a `pretrained_cfg` or `pretrained_cfg_overlay` that names a
            file.
        arguments: `num_classes`, `in_chans`, `global_pool`, `drop_rate`, `output_stride`, `zero_init_last` (False by
            default, unlike timm's), `features_only`, `out_indices` as timm's ResNets take them; `activations`, `exact`
            and the others of `revnet.models.revnet50`. There is no stochastic depth: `drop_path_rate` must be 0.

    Raises:
        RuntimeError: `pretrained=True` without such a file.
        ValueError: `features_only` of a network that has no stages, or by another way than `forward_intermediates`.

    Example:
        >>> import timm, torch
        >>> import revnet.timm
        >>> backbone = timm.create_model("revnet50", features_only=True, out_indices=(1, 2))
        >>> [tuple(feature.shape) for feature in backbone(torch.randn(1, 3, 64, 64))]
        [(1, 256, 16, 16), (1, 512, 8, 8)]
    """
    return _create("revnet50", pretrained, **arguments)


@register_model
def revnet101(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """RevNet in the place of timm's resnet101; arguments as in `revnet50`."""
    return _create("revnet101", pretrained, **arguments)


@register_model
def revnet152(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """RevNet in the place of timm's resnet152; arguments as in `revnet50`."""
    return _create("revnet152", pretrained, **arguments)


@register_model
def revnext50_32x4d(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """RevNet in the place of timm's resnext50_32x4d; arguments as in `revnet50`."""
    return _create("revnext50_32x4d", pretrained, **arguments)


@register_model
def wide_revnet50_2(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """RevNet in the place of timm's wide_resnet50_2; arguments as in `revnet50`."""
    return _create("wide_revnet50_2", pretrained, **arguments)
