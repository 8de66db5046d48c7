"""The paper's networks, to the last parameter."""

from functools import partial

import pytest
import torch
from torch import nn

from revnet.models import get_model

PARAMETERS = {
    "resnet32": (464_154, 470_004),
    "revnet38": (464_890, 475_060),
    "resnet110": (1_727_962, 1_733_812),
    "revnet110": (1_729_194, 1_740_804),
    "resnet164": (1_703_258, 1_726_388),
    "revnet164": (1_748_778, 1_794_948),
}
IMAGENET_PARAMETERS = {
    "preact_resnet50": 25_549_352,
    "preact_resnet101": 44_541_480,
    "revnet56": 27_553_128,
    "revnet104": 45_428_072,
}
# Channels of the stem and of every stage's output.
WIDTHS = {
    "resnet32": (16, 16, 32, 64),
    "revnet38": (32, 32, 64, 112),
    "resnet110": (16, 16, 32, 64),
    "revnet110": (32, 32, 64, 128),
    "resnet164": (16, 64, 128, 256),
    "revnet164": (32, 128, 256, 512),
    "preact_resnet50": (64, 256, 512, 1024, 2048),
    "preact_resnet101": (64, 256, 512, 1024, 2048),
    "revnet56": (128, 512, 1024, 2048, 3328),
    "revnet104": (128, 512, 1024, 2048, 3328),
}
# Convolutions on the way from the image to the logits, and the linear layer: the number in the name.
DEPTHS = {
    "resnet32": 32,
    "revnet38": 38,
    "resnet110": 110,
    "revnet110": 110,
    "resnet164": 164,
    "revnet164": 164,
    "preact_resnet50": 50,
    "preact_resnet101": 101,
    "revnet56": 56,
    "revnet104": 104,
}


def count(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_the_cifar_networks(name):
    assert (count(get_model(name, num_classes=10)), count(get_model(name, num_classes=100))) == PARAMETERS[name]


@pytest.mark.parametrize("name", IMAGENET_PARAMETERS)
def test_parameters_of_the_imagenet_networks(name):
    with torch.device("meta"):
        network = get_model(name)
    assert count(network) == IMAGENET_PARAMETERS[name]


@pytest.mark.parametrize("name", WIDTHS)
def test_shape_of_every_stage(name):
    imagenet = name in IMAGENET_PARAMETERS
    size = 224 if imagenet else 32
    shapes = []
    with torch.device("meta"):
        network = get_model(name).eval()
        network.layer1.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
        for stage in network.stage_names:
            network.get_submodule(stage).register_forward_hook(lambda *call: shapes.append(tuple(call[-1].shape)))
        logits = network(torch.empty(2, 3, size, size))
    first = size // 4 if imagenet else size
    sizes = [first, *[first // 2**stage for stage in range(len(WIDTHS[name]) - 1)]]
    assert shapes == [(2, width, s, s) for width, s in zip(WIDTHS[name], sizes, strict=True)]
    assert logits.shape == (2, 1000 if imagenet else 10)


@pytest.mark.parametrize("name", DEPTHS)
def test_the_number_in_the_name_counts_the_layers_with_weights(name):
    with torch.device("meta"):
        network = get_model(name)
    shortcuts = {m for path, m in network.named_modules() if "shortcut" in path}
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m not in shortcuts]
    assert len(layers) == DEPTHS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_first_unit_has_no_leading_normalisation_and_its_g_has(name):
    network = get_model(name)
    branches = [m for path, m in network.named_modules() if path.endswith((".f", ".g", ".branch"))]
    assert [b.bn1 is None for b in branches] == [True] + [False] * (len(branches) - 1)


def test_constants_of_normalisation_and_initialisation():
    network = get_model("revnet110")
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}
    weight = network.layer3[2].f.conv1.weight
    assert weight.shape == (64, 64, 3, 3)
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    assert all(m.bias is None for m in network.modules() if isinstance(m, nn.Conv2d))
    assert network.fc.bias is not None


@pytest.mark.parametrize("name", WIDTHS)
def test_a_norm_layer_is_that_of_the_whole_network(name):
    with torch.device("meta"):
        network = get_model(name, norm_layer=partial(nn.GroupNorm, 8))
        assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
        assert any(isinstance(module, nn.GroupNorm) for module in network.layer1.modules())
    with pytest.raises(TypeError, match="norm_layer=3 is no function"):
        get_model(name, norm_layer=3)
