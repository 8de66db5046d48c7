"""Estimates equal measurements, take no memory and leave the model alone."""

from functools import partial

import pytest
import torch
import torchvision
from torch import nn

from revnet.models import get_model
from revnet.profiling import estimate, measure_memory
from revnet.profiling.estimate import fake_copy

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("activations", ["store", "recompute", "reconstruct"])
def test_estimate_equals_the_measurement_to_the_byte(activations, exact):
    network = get_model("revnet38", activations=activations, exact=exact)
    assert estimate(network, (3, 3, 16, 16), optimizer=SGD) == measure_memory(
        network, torch.randn(3, 3, 16, 16), optimizer=SGD
    )


@pytest.mark.parametrize("activations", ["store", "recompute", "reconstruct"])
def test_estimate_under_autocast(activations):
    network, x = get_model("revnet38", activations=activations), torch.randn(4, 3, 16, 16)
    estimated = estimate(network, x.shape, dtype=torch.bfloat16)
    measured = measure_memory(network, x, dtype=torch.bfloat16)
    # Without data, statistics of a batch in half precision are taken to be in half precision too.
    assert estimated.peak == pytest.approx(measured.peak, rel=0.001)
    assert estimated.kept == pytest.approx(measured.kept, rel=0.001)


@pytest.mark.parametrize("make", [torchvision.models.resnet18, torchvision.models.mobilenet_v3_small])
@pytest.mark.parametrize("optimizer", [SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_other_networks_and_optimizers(make, optimizer):
    network, x = make(), torch.randn(2, 3, 32, 32)
    assert estimate(network, x.shape, optimizer=optimizer) == measure_memory(network, x, optimizer=optimizer)


def test_attention_and_dropout():
    network = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    assert estimate(network, (2, 10, 32)) == measure_memory(network, torch.randn(2, 10, 32))


def test_a_model_without_data_is_estimated_at_any_size():
    with torch.device("meta"):
        network = torchvision.models.resnet50()
    memory = estimate(network, (4096, 3, 224, 224), optimizer=SGD)
    assert memory.total > 300e9
    assert memory.parameters == memory.gradients + 4 * 2 * 26560 + 8 * 53  # statistics and counts of 53 normalisations


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_model_without_data_is_estimated_as_on_a_cpu(dtype):
    network = Scaled(8)
    with torch.device("meta"):
        without = Scaled(8)
    first, second = (estimate(model, (4, 8), dtype=dtype, optimizer=SGD) for model in (without, network))
    assert first == second
    assert {t.device.type for t in (without.linear.weight, without.scale)} == {"meta"}


def test_shared_and_frozen_parameters():
    network = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    network[1].weight = network[0].weight
    network[2].requires_grad_(False)
    memory = estimate(network, (8, 64), optimizer=SGD)
    assert memory == measure_memory(network, torch.randn(8, 64), optimizer=SGD)
    assert memory.gradients == memory.optimizer == 4 * (64 * 64 + 2 * 64)


def test_the_model_is_not_changed():
    network = get_model("revnet38").eval()
    network(torch.randn(1, 3, 16, 16)).sum().backward()
    before = {name: (t, t.clone()) for name, t in network.state_dict(keep_vars=True).items()}
    gradient, random = network.fc.weight.grad, torch.get_rng_state()
    estimate(network, (2, 3, 16, 16), optimizer=SGD)
    after = network.state_dict(keep_vars=True)
    assert all(after[name] is t and t.equal(copy) for name, (t, copy) in before.items())
    assert network.fc.weight.grad is gradient
    assert torch.get_rng_state().equal(random)
    assert not network.training


class Remembers(nn.Linear):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last.square()


def test_a_feature_map_that_a_forward_pass_has_left_is_no_hindrance():
    network = Remembers(64, 64)
    network(torch.randn(8, 64))
    last = network.last
    assert estimate(network, (8, 64)) == measure_memory(network, torch.randn(8, 64))
    network.last = last
    estimate(network, (8, 64))
    assert network.last is last


class Marked(nn.Linear):
    """Its forward pass reads what hangs on a parameter and on a buffer, and notes there that it ran."""

    def __init__(self):
        super().__init__(8, 8)
        self.register_buffer("mask", torch.ones(8))
        self.weight.scale, self.weight.calls, self.mask.factor = 0.5, [], 2.0

    def forward(self, x):
        self.weight.calls.append(len(x))
        return super().forward(x) * self.weight.scale + self.mask * self.mask.factor


def test_what_hangs_on_parameters_and_buffers_goes_along_and_is_not_changed():
    network = Marked()
    estimated = estimate(network, (4, 8))
    assert network.weight.calls == []
    assert estimated == measure_memory(network, torch.randn(4, 8))
    again = fake_copy(fake_copy(network))  # as a plan makes it
    assert (again.weight.scale, again.mask.factor) == (0.5, 2.0)


def test_mistakes_are_told(caplog):
    network = get_model("revnet38")
    with pytest.raises(ValueError, match=r"input_shape=\(2, 4, 8, 8\): RevNet does not take it: ValueError: images of"):
        estimate(network, (2, 4, 8, 8))
    with pytest.raises(ValueError, match=r"input_shape=\(2, 7\): Linear does not take it: RuntimeError"):
        estimate(nn.Linear(8, 8), (2, 7))
    assert not caplog.records
    for shape in ((2, 0), (2, 3.0), (), "2, 3", (-1, 2), 8):
        with pytest.raises(ValueError, match="input_shape must be a sequence of positive integers"):
            estimate(network, shape)
    with pytest.raises(ValueError, match="no floating-point tensor"):
        estimate(nn.Sequential(nn.Linear(4, 4), Number()), (2, 4))
    with pytest.raises(ValueError, match="depends on no parameter that requires grad"):
        estimate(nn.Linear(4, 4).requires_grad_(False), (2, 4))
    with pytest.raises(ValueError, match=r"Sequential, its loss or its optimizer looks at the values.*measure_memory"):
        estimate(nn.Sequential(nn.Linear(4, 4), Decides()), (2, 4))
    with pytest.raises(ValueError, match="loss must return a scalar tensor, got a tensor of shape"):
        estimate(nn.Linear(4, 4), (2, 4), loss=lambda y: y)
    with pytest.raises(ValueError, match=r"dtype must be .* got torch.float64"):
        estimate(nn.Linear(4, 4), (2, 4), dtype=torch.float64)
    instance = torch.optim.SGD(network.parameters(), lr=0.1)
    for optimizer in (lambda parameters: 3, instance):
        with pytest.raises(TypeError, match="optimizer must be a function from parameters"):
            estimate(nn.Linear(4, 4), (2, 4), optimizer=optimizer)


class Scaled(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.scale = torch.ones(width)  # neither a parameter nor a buffer

    def forward(self, x):
        return self.linear(x) * self.scale


class Number(nn.Module):
    def forward(self, x):
        return 3


class Decides(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x
