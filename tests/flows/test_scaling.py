import copy

import pytest
import torch

from revnet import ReversibleSequence
from revnet.flows import ActNorm, OnHalf, Scaling
from tests.reversible.networks import EVERY


@EVERY
def test_actnorm_is_initialised_once_from_the_first_batch(activations):
    layer = ActNorm(3)
    sequence = ReversibleSequence([layer], activations)
    y = sequence(5 + 2 * torch.randn(8, 3, 4, 4))
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var((0, 2, 3), correction=0), torch.ones(3))
    before = copy.deepcopy(layer.state_dict())
    assert before["initialised"]
    y.square().sum().backward()  # evaluates it again
    sequence(torch.randn(8, 3, 4, 4)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert layer.shift.grad is not None


@EVERY
def test_gradients_of_the_first_step_are_those_of_an_initialised_layer(activations):
    x = 5 + 2 * torch.randn(8, 3, 4, 4, dtype=torch.float64)
    weight = torch.randn_like(x)
    layer = ActNorm(3).double()
    sequence = ReversibleSequence([layer], activations)
    (sequence(x) * weight).sum().backward()
    first = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    (sequence(x) * weight).sum().backward()
    torch.testing.assert_close(first, [p.grad for p in layer.parameters()])


def test_a_checkpoint_says_that_it_is_initialised():
    layer = ActNorm(3)
    layer(1 + torch.randn(8, 3))
    restored = ActNorm(3)
    restored(7 + torch.randn(8, 3))
    restored.load_state_dict(layer.state_dict())
    x = 9 + torch.randn(8, 3)
    assert torch.equal(restored(x), layer(x))
    restored.load_state_dict(ActNorm(3).state_dict())  # and that it is not
    assert restored(x).mean().abs() < 1e-4


def test_evaluation_does_not_initialise():
    layer, x = ActNorm(3).eval(), torch.randn(8, 3)
    assert torch.equal(layer(x), x)
    assert torch.equal(layer.train().inverse(x), x)
    assert not layer.initialised


def test_a_constant_channel_keeps_its_scale():
    layer = ActNorm(2)
    y = layer(torch.stack((torch.full((8,), 3.0), torch.randn(8)), 1))
    assert layer.log_scale[0] == 0
    assert torch.equal(y[:, 0], torch.zeros(8))


def test_half_is_0_or_1():
    with pytest.raises(ValueError, match="half=2: give 0 for the first"):
        OnHalf(Scaling((3,)), 2)
