import pytest
import torch
from torch import nn

from revnet.training import parameter_groups


def names(network: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    of = {parameter: name for name, parameter in network.named_parameters()}
    return {of[parameter] for parameter in parameters}


def test_weights_of_convolutions_and_linear_layers_decay_and_nothing_else() -> None:
    network = nn.Sequential()
    network.conv = nn.Conv2d(3, 4, 3)
    network.transposed = nn.ConvTranspose1d(4, 4, 3)
    network.norm = nn.BatchNorm2d(4)
    network.embedding = nn.Embedding(3, 4)
    network.fc = nn.Linear(4, 2)
    network.scale = nn.Parameter(torch.ones(1))
    decaying, others = parameter_groups(network)
    assert names(network, decaying["params"]) == {"conv.weight", "transposed.weight", "fc.weight"}
    assert "weight_decay" not in decaying
    assert others["weight_decay"] == 0
    assert len(decaying["params"]) + len(others["params"]) == len(list(network.parameters()))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_only_decaying_weights_shrink_without_gradients(optimizer: type[torch.optim.Optimizer]) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    stepper = optimizer(parameter_groups(network), lr=0.1, weight_decay=0.5)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stepper.step()
    changed = {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"0.weight"}


def test_shared_and_frozen_parameters() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    second.bias.requires_grad_(False)
    decaying, others = parameter_groups(nn.Sequential(first, second))
    assert len(decaying["params"]) == 1
    assert len(others["params"]) == 1


def test_no_group_is_empty() -> None:
    assert len(parameter_groups(nn.BatchNorm2d(3))) == 1
    assert len(parameter_groups(nn.Linear(3, 3, bias=False))) == 1
