"""Statistics of normalisation count a step once."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from revnet import is_recomputing
from tests.reversible.networks import MODES, basic, sequence, step

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
