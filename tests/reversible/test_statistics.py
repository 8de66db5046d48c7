"""Statistics of normalisation count a step once."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from revnet import ReversibleBlock, ReversibleSequence, is_recomputing
from revnet.reversible import Merge, Split
from tests.reversible.networks import MODES, basic, same, sequence, step

BATCHES = torch.randn(3, 4, 8, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def bn_momentum(net, momentum):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    return net


def same_statistics(net, truth, steps):
    found, expected = net.state_dict(), truth.state_dict()
    assert found.keys() == expected.keys()
    counts = [value for name, value in found.items() if name.endswith("num_batches_tracked")]
    assert len(counts) == 16
    return all(count == steps for count in counts) and all(torch.equal(found[name], expected[name]) for name in found)


@MODES
@pytest.mark.parametrize("momentum", [0.1, None])
def test_normalisation_statistics_are_updated_once_a_step(activations, exact, momentum):
    net, truth = (bn_momentum(sequence(value, exact=exact), momentum) for value in (activations, "store"))
    for count, x in enumerate(BATCHES, 1):
        step(net, x)
        step(truth, x)
        assert same_statistics(net, truth, count)


@MODES
def test_update_bn_updates_statistics_without_gradients(activations, exact):
    net, truth = (sequence(value, exact=exact) for value in (activations, "store"))
    before = [b.clone() for b in net.buffers()]
    for module in (net, truth):
        update_bn(BATCHES, module)
    assert same_statistics(net, truth, 3)
    assert not any(map(torch.equal, before, net.buffers()))


class Fails(nn.Module):
    """Raises in its second evaluation, after its normalisation has run."""

    def __init__(self, channels):
        super().__init__()
        self.inner = basic(channels)

    def forward(self, x):
        y = self.inner(x)
        if is_recomputing():
            raise ArithmeticError("planned")
        return y


@MODES
def test_statistics_and_parameters_are_restored_when_the_backward_pass_raises(activations, exact):
    net = sequence(activations, branch=Fails, exact=exact)
    y = net(BATCHES[0])
    tensors = [*net.parameters(), *net.buffers()]
    before = [t.clone() for t in tensors]
    with pytest.raises(ArithmeticError, match="planned"):
        y.sum().backward()
    assert all(a is b for a, b in zip(tensors, [*net.parameters(), *net.buffers()], strict=True))
    assert all(map(torch.equal, tensors, before))
    assert not is_recomputing()


@MODES
@pytest.mark.parametrize(
    "norm", [partial(nn.BatchNorm2d, affine=False), partial(nn.InstanceNorm2d, track_running_stats=True)]
)
def test_a_normalisation_without_weights_is_repeated_to_the_bit_in_half_precision(activations, exact, norm):
    """It takes the dtype to compute in from its statistics."""

    def branch():
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm(4), nn.Conv2d(4, 4, 3, padding=1))

    found, x = [], torch.randn(4, 8, 9, 9)
    for value in (activations, "store"):
        torch.manual_seed(0)
        layers = [Split(), *(ReversibleBlock(branch(), branch()) for _ in range(2)), Merge()]
        net = ReversibleSequence(layers, value, exact)
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        y.square().mean().backward()
        found.append([*(p.grad for p in net.parameters()), *net.buffers()])
        if exact and value == "reconstruct":
            assert net.reconstruction_error == 0
    (*gradients, counted), (*expected, truth) = found
    assert torch.equal(counted, truth)
    if exact or activations == "recompute":
        assert same(gradients, expected, True)
    else:  # what drifts in the stream is rounded to bfloat16
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0.03, atol=0.03 * float(other.abs().max()))


class CountsWithGradients(nn.Module):
    """Keeps a running mean in evaluations that give gradients."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(6, 6)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return self.f(x)


@MODES
def test_statistics_that_are_kept_only_with_gradients_are_kept_once(activations, exact):
    buffers = []
    for value in (activations, "store"):
        torch.manual_seed(0)
        net = ReversibleSequence([ReversibleBlock(CountsWithGradients(), CountsWithGradients())], value, exact)
        for x in torch.randn(3, 2, 4, 6):
            sum(net(*x)).sum().backward()
        buffers.append(list(net.buffers()))
    assert all(buffer.abs().sum() > 0 for buffer in buffers[1])
    assert same(*buffers, True)
