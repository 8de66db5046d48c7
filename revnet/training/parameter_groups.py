"""Which parameters decay."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["parameter_groups"]


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that decay and those that never do.

    The weights of convolutions and linear layers decay, at the optimizer's own `weight_decay`; everything else
    (biases, scales and shifts of normalisation, bare parameters) is put in a group with `weight_decay` 0.

    Args:
        network: any module.

    Returns:
        At most two groups, none of them empty, for the first argument of any `torch.optim` optimizer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet.training import parameter_groups
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> optimizer = torch.optim.SGD(parameter_groups(network), lr=0.1, weight_decay=2e-4)
        >>> [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
        [(0.0002, 1), (0.0, 3)]
    """
    decaying = {id(module.weight) for module in network.modules() if isinstance(module, (_ConvNd, nn.Linear))}
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trainable if id(parameter) in decaying]},
        {
            "params": [parameter for parameter in trainable if id(parameter) not in decaying],
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]
