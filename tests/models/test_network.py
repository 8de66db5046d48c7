"""Networks as a whole: gradients, memory, sizes, misuse."""

import pytest
import torch
from torch import nn

from revnet import ReversibleSequence, set_activations
from revnet.models import RevNet, get_model, list_models, revnet18, revnet38, revnet56
from revnet.models.branches import BasicBranch
from revnet.models.paper import table_1
from revnet.models.units import PoolPadShortcut
from revnet.profiling import MemoryTimeline, measure_memory
from revnet.reversible import slots
from tests.reversible.networks import relative, step

SMALL = ["resnet32", "revnet38", "resnet164", "revnet164"]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("activations", ["recompute", "reconstruct"])
def test_gradients_equal_store(name, activations):
    network = get_model(name).double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    set_activations(network, "store")
    y, truth = step(network, x)
    after = {k: v.clone() for k, v in network.state_dict().items()}
    network.load_state_dict(state)
    set_activations(network, activations)
    z, found = step(network, x)
    assert torch.equal(y, z)
    assert relative(found, truth) <= 1e-10
    assert all(torch.equal(after[k], v) for k, v in network.state_dict().items())


def test_gradients_of_an_imagenet_network_equal_store():
    network = revnet56(num_classes=7).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    set_activations(network, "store")
    _, truth = step(network, x)
    set_activations(network, "reconstruct")
    _, found = step(network, x)
    assert relative(found, truth) <= 1e-10


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in (*SMALL, "preact_resnet50", "revnet56", "revnet18", "revnet50")]
    + [("revnet50", {"downsampling": "space_to_depth"})],
)
def test_every_gradient_of_a_channels_last_network_is_channels_last(name, options, autocast):
    network = get_model(name, **options).to(memory_format=torch.channels_last)
    set_activations(network, "store")  # in the other modes nobody sees those between two units
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last).requires_grad_()
    seen = []

    def watch(module, inputs, output):
        for y in output if isinstance(output, tuple) else (output,):
            y.register_hook(lambda gradient: seen.append((type(module).__name__, gradient)))

    for module in network.modules():
        if module is not network.act:  # a mean over all pixels follows it, which sends back the same for all
            module.register_forward_hook(watch)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = network(x)
    y.float().square().mean().backward()
    others = [
        (kind, gradient.shape)
        for kind, gradient in [*seen, ("input", x.grad)]
        if gradient.ndim == 4 and not gradient.is_contiguous(memory_format=torch.channels_last)
    ]
    assert len(seen) > 50
    assert not others


@pytest.mark.parametrize("name", ["revnet38", "revnet110", "revnet164"])
def test_only_the_outputs_of_the_stages_are_kept(name):
    network = get_model(name)
    x = torch.randn(8, 3, 32, 32)
    outputs = []
    for stage in network.stage_names:
        network.get_submodule(stage).register_forward_hook(lambda *call: outputs.append(call[-1].numel() * 4))
    if name == "revnet164":  # its first stage begins with a transition, which keeps what the stem gave
        network.layer1.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0].numel() * 4))
    with MemoryTimeline([x, *network.parameters(), *network.buffers()]) as timeline:
        y = network(x)
        kept = timeline.live()
    logits_and_pooled = y.numel() * 4 + x.shape[0] * network.fc.in_features * 4
    samples = kept - sum(outputs) - logits_and_pooled
    assert 0 <= samples <= 64 * 1024


def test_peak_of_a_revnet_is_a_tenth_of_ordinary_backpropagation():
    network = get_model("revnet110")
    x = torch.randn(4, 3, 32, 32)
    reversible = measure_memory(network, x)
    set_activations(network, "store")
    assert reversible.peak * 10 <= measure_memory(network, x).peak


def test_default_activations_and_the_switch():
    network = get_model("revnet38")
    assert network.layer1.activations == network.stem_activations == "reconstruct"
    assert {slot.value() for slot in slots(get_model("resnet32"))} == {"store"}
    assert get_model("revnet38", activations="recompute").layer2.activations == "recompute"
    set_activations(network, "store")
    sequences = [m for m in network.modules() if isinstance(m, ReversibleSequence)]
    assert len(sequences) == 3
    assert {m.activations for m in sequences} == {"store"}
    assert {slot.value() for slot in slots(network)} == {"store"}


@pytest.mark.parametrize("size", [(4, 4), (33, 21), (7, 40)])
@pytest.mark.parametrize("name", SMALL)
def test_images_of_any_size(name, size):
    assert get_model(name).eval()(torch.randn(2, 3, *size)).shape == (2, 10)


@pytest.mark.parametrize("name", ["preact_resnet50", "revnet18", "revnet50", "revnet56"])
def test_images_smaller_than_the_total_stride_are_taken_as_by_torchvision(name):
    assert get_model(name, num_classes=5)(torch.randn(2, 3, 28, 20)).shape == (2, 5)
    assert get_model(name, num_classes=5).eval()(torch.randn(2, 3, 1, 1)).shape == (2, 5)


def test_images_that_cannot_be_squeezed_are_refused_with_the_sizes_that_can():
    network = revnet18(downsampling="space_to_depth")
    for side in (1, 16, 48):
        with pytest.raises(ValueError, match=rf"\(2, 3, {side}, {side}\): height and width must be multiples of 32"):
            network(torch.randn(2, 3, side, side))
    assert network(torch.randn(2, 3, 31, 64)).shape == (2, 1000)  # the stem makes 8x16 of it


def test_the_first_layer_may_be_anything():
    network = revnet18(num_classes=5)
    network.conv1 = nn.Sequential(nn.Conv2d(6, 3, 1), network.conv1)
    assert network(torch.randn(2, 6, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize(
    ("child", "layer"),
    [
        ("relu", nn.ReLU()),
        ("relu", nn.SiLU()),
        ("relu", nn.LeakyReLU(-0.5)),
        ("maxpool", nn.MaxPool2d(2)),
        ("maxpool", nn.AvgPool2d(3, 2, 1)),
    ],
)
def test_the_stem_computes_its_children_one_after_the_other_whatever_stands_there(child, layer):
    network, x = revnet18(num_classes=3).eval(), 10 * torch.randn(2, 3, 64, 64)
    setattr(network, child, layer)
    assert torch.equal(network.run_stem(x), network.maxpool(network.relu(network.bn1(network.conv1(x)))))


def without_normalisation():
    def identity(channels):
        return nn.Identity()

    stem_and_stages = table_1(BasicBranch, (2, 2), (8, 8, 16), identity)
    return RevNet(*stem_and_stages, small_images=True, num_classes=3, norm_layer=identity).double()


def test_a_network_without_normalisation_has_the_gradients_of_store():
    network, x = without_normalisation(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    set_activations(network, "store")
    y, truth = step(network, x)
    set_activations(network, "reconstruct")
    z, found = step(network, x)
    assert torch.equal(y, z)
    assert relative(found, truth) <= 1e-10


@pytest.mark.parametrize("with_gradients", [False, True])
def test_the_tail_leaves_alone_what_the_last_stage_returned(with_gradients):
    network, taps = without_normalisation(), []
    set_activations(network, "store")
    network.layer2.register_forward_hook(lambda _m, _i, y: taps.append((y, y.detach().clone())))
    with torch.set_grad_enabled(with_gradients):
        network(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    ((tapped, then),) = taps
    assert then.min() < 0
    assert torch.equal(tapped, then)


def test_gray_images_and_other_class_counts():
    network = revnet38(num_classes=3, in_channels=1)
    assert network(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    for wrong in (None, "10", 2.5):
        with pytest.raises(ValueError, match=f"num_classes={wrong!r}: give an integer of at least 1"):
            revnet38(num_classes=wrong)
    with pytest.raises(ValueError, match="num_classes=0"):
        revnet38(num_classes=0)
    with pytest.raises(ValueError, match="got 'all'"):
        revnet38(activations="all")


def test_pool_pad_shortcut():
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).view(1, 2, 4, 4)
    y = PoolPadShortcut(2, 5, 2)(x)
    assert y.shape == (1, 5, 2, 2)
    assert torch.equal(y[:, 1:3], torch.nn.functional.avg_pool2d(x, 2))
    assert y[:, 0].abs().sum() == y[:, 3:].abs().sum() == 0


def test_registry():
    assert {"preact_resnet50", "resnet110", "revnet104"} <= set(list_models())
    with pytest.raises(ValueError, match=r"unknown model 'revnet83'; did you mean 'revnet38'\?.*revnet164"):
        get_model("revnet83")
