"""The drop-in family against torchvision's ResNets: shapes, cost, arguments."""

import re
from fractions import Fraction

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from revnet import set_activations
from revnet.models import family, get_model, revnet18, revnet50
from revnet.models.branches import BasicBranch, BottleneckBranch
from tests.reversible.networks import relative, step

FAMILY = ["revnet18", "revnet34", "revnet50", "revnet101", "revnet152", "revnext50_32x4d", "wide_revnet50_2"]
STAGES = ["layer1", "layer2", "layer3", "layer4"]


def twin(name: str) -> nn.Module:
    return torchvision.models.get_model(name.replace("revn", "resn"))


def multiply_adds(network: nn.Module) -> int:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, 224, 224))
    return counter.get_total_flops() // 2


def shapes_of_stages(network: nn.Module, size: tuple[int, int]) -> list[torch.Size]:
    shapes: list[torch.Size] = []
    for stage in STAGES:
        getattr(network, stage).register_forward_hook(lambda module, inputs, y: shapes.append(y.shape))
    network(torch.empty(2, 3, *size))
    return shapes


@pytest.mark.parametrize("name", FAMILY)
def test_parameters_and_multiply_adds_are_those_of_the_table_and_within_3_percent_of_the_resnets(name):
    with torch.device("meta"):
        network, resnet = get_model(name).eval(), twin(name).eval()
    row = re.search(rf"^\| `{name}` \| (\S+) \| (.*) \| (\S+) \((\S+)\) \| (\S+) G \((\S+)\) \|$", family.__doc__, re.M)
    branches = [
        [m for m in getattr(network, stage).modules() if isinstance(m, BasicBranch | BottleneckBranch)]
        for stage in STAGES
    ]
    assert row[1] == "-".join(str(len(found) // 2) for found in branches)
    assert row[2] == ", ".join(str(found[-1].conv1.out_channels) for found in branches)
    parameters, theirs = (sum(p.numel() for p in net.parameters()) for net in (network, resnet))
    assert (row[3], row[4]) == (f"{parameters:,}", f"{parameters / theirs:.3f}")
    operations, of_theirs = multiply_adds(network), multiply_adds(resnet)
    assert (row[5], row[6]) == (f"{operations / 1e9:.2f}", f"{operations / of_theirs:.3f}")
    for ratio in (Fraction(parameters, theirs), Fraction(operations, of_theirs)):
        assert abs(ratio - 1) <= Fraction(3, 100)


def test_the_builders_are_those_of_the_table():
    assert list(family.BUILDERS) == re.findall(r"^\| `(\w+)` \|", family.__doc__, re.M) == FAMILY


@pytest.mark.parametrize("size", [(224, 224), (97, 130)])
@pytest.mark.parametrize("name", FAMILY)
def test_stages_have_the_shapes_of_the_resnets(name, size):
    with torch.device("meta"):
        network, resnet = get_model(name).eval(), twin(name).eval()
        assert shapes_of_stages(network, size) == shapes_of_stages(resnet, size)
    assert network.inplanes == resnet.inplanes
    # In torchvision's order, on which its IntermediateLayerGetter relies; the tail's BN-ReLU comes besides.
    children = [name for name, _ in network.named_children() if name not in ("norm", "act")]
    assert children == [name for name, _ in resnet.named_children()]


def test_children_in_their_order_are_the_features_of_the_network():
    torch.manual_seed(0)
    network = revnet18(num_classes=3).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    features = nn.Sequential(*list(network.children())[:-1])
    assert network.fc(features(x).flatten(1)).equal(network(x))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("revnet18", {}),
        ("revnet50", {"zero_init_residual": True}),
        ("revnet50", {"replace_stride_with_dilation": [False, True, True]}),
        ("revnext50_32x4d", {"norm_layer": lambda channels: nn.GroupNorm(4, channels)}),
        ("revnet50", {"downsampling": "space_to_depth", "small_images": True}),
        ("revnet18", {"downsampling": "space_to_depth"}),
    ],
)
@pytest.mark.parametrize("activations", ["recompute", "reconstruct"])
def test_gradients_equal_store(name, arguments, activations):
    torch.manual_seed(0)
    network = get_model(name, num_classes=5, **arguments).double()
    size = 16 if arguments.get("small_images") else 64
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    set_activations(network, "store")
    y, truth = step(network, x)
    network.load_state_dict(state)
    set_activations(network, activations)
    z, found = step(network, x)
    assert torch.equal(y, z)
    assert relative(found, truth) <= 1e-8


def test_exact_gradients_are_bit_equal():
    torch.manual_seed(0)
    for downsampling in ("strided", "space_to_depth"):
        network = revnet18(num_classes=5, small_images=True, downsampling=downsampling, exact=True)
        x = torch.randn(4, 3, 16, 16)
        state = {k: v.clone() for k, v in network.state_dict().items()}
        set_activations(network, "store")
        _, truth = step(network, x)
        network.load_state_dict(state)
        set_activations(network, "reconstruct")
        _, found = step(network, x)
        assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


def test_a_dilated_network_computes_that_of_strides_at_more_places():
    torch.manual_seed(0)
    network = revnet50().eval().double()
    dilated = revnet50(replace_stride_with_dilation=[False, True, True]).eval().double()
    dilated.load_state_dict(network.state_dict())
    x = torch.randn(1, 3, 128, 128, dtype=torch.float64)
    states = {}
    for net in (network, dilated):
        net.layer4.register_forward_hook(lambda module, _, y, key=net: states.__setitem__(key, y))
        net(x)
    assert states[dilated].shape[-1] == 4 * states[network].shape[-1]
    assert torch.allclose(states[dilated][..., ::4, ::4], states[network], rtol=1e-10, atol=1e-10)


def test_zero_init_residual_makes_every_reversible_block_the_identity():
    network = revnet50(zero_init_residual=True, exact=False).eval()
    x = torch.randn(2, 256, 8, 8)
    assert torch.equal(network.layer1[2:](*x.chunk(2, 1)), x)


def test_the_first_state_of_a_fully_reversible_network_follows_from_the_last():
    torch.manual_seed(0)
    network = revnet18(downsampling="space_to_depth", exact=True, num_classes=3).eval()
    first = network.run_stem(torch.randn(2, 3, 64, 64))
    last = network.layers(first)
    assert last.shape == (2, 4096, 2, 2)
    # On the grid of exact mode to the bit: the state entered it as multiples of 2^-16.
    again = network.layers.inverse(last)
    assert (again - first).abs().max() <= 2**-17
    assert torch.equal(network.layers(again), last)


def test_a_fully_reversible_network_has_no_stages_to_tap():
    network = revnet50(downsampling="space_to_depth")
    with pytest.raises(AttributeError, match=r"layer2: .* one sequence, `layers`.*downsampling='strided'"):
        _ = network.layer2
    with pytest.raises(AttributeError, match="stages"):
        _ = network.stages


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (revnet18, {"groups": 2}, "groups=2.*revnet50"),
        (revnet18, {"width_per_group": 128}, "width_per_group=128.*revnet50"),
        (revnet18, {"replace_stride_with_dilation": [False, False, True]}, "basic branches are not dilated"),
        (revnet50, {"replace_stride_with_dilation": [True]}, "three values"),
        (revnet50, {"downsampling": "pool"}, "downsampling='pool'.*space_to_depth"),
        (
            revnet50,
            {"downsampling": "space_to_depth", "replace_stride_with_dilation": [False, False, True]},
            "has no strides",
        ),
    ],
)
def test_arguments_that_cannot_be_are_refused(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)
