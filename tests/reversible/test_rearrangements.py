"""Layers that move values and change none, where a sequence is reconstructed: their gradients are those of store."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from revnet import ReversibleBlock, ReversibleSequence, is_recomputing
from revnet.reversible import Merge, Rearrangement, ReconstructionError, Split, Squeeze, squeeze
from tests.reversible.networks import EXACT, same

C = 6


def linear():
    return nn.Linear(C // 2, C // 2, dtype=torch.float64)


def pointwise():
    return nn.Conv2d(2, 2, 1, dtype=torch.float64)


class Shuffle(Rearrangement):
    """A user's own, with an order of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.arange(C))

    def forward(self, x, context=None):
        return x[:, self.order]

    def inverse(self, x, context=None):
        return x[:, self.order.argsort()]


class RandomShuffle(Rearrangement):
    """Another order in every forward pass, kept in an attribute."""

    def forward(self, x, context=None):
        self.order = torch.randperm(C)
        return x[:, self.order]

    def inverse(self, x, context=None):
        return x[:, self.order.argsort()]


@EXACT
@pytest.mark.filterwarnings("ignore:the reconstructed input")
def test_an_order_that_has_changed_since_is_seen(exact):
    layers = [RandomShuffle(), Split(), ReversibleBlock(linear(), linear()), Merge()]
    sequence, x = ReversibleSequence(layers, exact=exact), torch.randn(5, C, dtype=torch.float64, requires_grad=True)
    y = sequence(x)
    with torch.no_grad():
        sequence(x)
    with pytest.raises(ReconstructionError):
        y.sum().backward()


def shuffled(activations, exact):
    torch.manual_seed(0)
    return ReversibleSequence([Shuffle(), Split(), ReversibleBlock(linear(), linear()), Merge()], activations, exact)


@EXACT
def test_the_order_is_that_of_the_forward_pass(exact):
    x, order, found = torch.randn(2, C, dtype=torch.float64), torch.tensor([3, 4, 5, 0, 2, 1]), []
    for activations in ("reconstruct", "store"):
        leaf = x.clone().requires_grad_()
        y = functional_call(shuffled(activations, exact), {"0.order": order}, (leaf,))
        y.square().sum().backward()
        found.append([leaf.grad])
    assert same(*found, exact)


@EXACT
def test_an_order_that_is_changed_between_the_passes_is_named(exact):
    net = shuffled("reconstruct", exact)
    y = net(torch.randn(2, C, dtype=torch.float64, requires_grad=True))
    net[0].order.copy_(torch.tensor([3, 4, 5, 0, 2, 1]))
    with pytest.raises(RuntimeError, match="buffer 'order' of Shuffle in a reversible sequence was changed in place"):
        y.sum().backward()


@EXACT
@pytest.mark.parametrize("used", [0, 1])
def test_of_halves_that_stay_apart_one_alone_may_be_used(exact, used):
    halves, found = torch.randn(2, 1, 2, 4, 4, dtype=torch.float64), []
    for activations in ("reconstruct", "store"):
        torch.manual_seed(0)
        net = ReversibleSequence([Squeeze(1), ReversibleBlock(pointwise(), pointwise()), Squeeze()], activations, exact)
        leaves = [x.clone().requires_grad_() for x in halves]
        net(*leaves)[used].square().sum().backward()
        found.append([t.grad for t in (*leaves, *net.parameters())])
    assert same(*found, exact)  # None where it is None under store


@EXACT
def test_a_hook_ahead_of_a_rearrangement_s_backward_pass_may_change_the_gradient(exact):
    x, found = torch.randn(2, C, dtype=torch.float64), []
    for activations in ("store", "reconstruct"):
        torch.manual_seed(0)
        net = ReversibleSequence([Split(), ReversibleBlock(linear(), linear()), Merge()], activations, exact)
        net[0].register_full_backward_pre_hook(lambda _, gradients: tuple(2 * g for g in gradients))
        found.append(torch.autograd.grad(net(leaf := x.clone().requires_grad_()).square().sum(), leaf))
    assert same(*found, exact)


@EXACT
@pytest.mark.parametrize("inverted", [False, True])
def test_hooks_see_activations_and_never_gradients(exact, inverted):
    net, seen = ReversibleSequence([Split(), ReversibleBlock(linear(), linear()), Merge()], exact=exact), []
    x = torch.randn(2, C, dtype=torch.float64, requires_grad=True)
    run = net.inv if inverted else net
    run(x).square().sum().backward()
    expected, x.grad = x.grad, None
    for layer in (net[0], net[-1]):
        layer.register_forward_hook(lambda *_: seen.append(is_recomputing()))
    net[0].register_full_backward_hook(lambda *_: seen.append("gradient"))
    run(x).square().sum().backward()
    assert torch.equal(x.grad, expected)
    # Inverted, the layer's `inverse` runs in the forward pass, which sets off no hooks.
    assert (seen.count(False), seen.count("gradient")) == ((0, 0) if inverted else (2, 1))


class StridedHalves(Rearrangement):
    """Hands out views with gaps, on which normalisation takes another kernel."""

    def forward(self, x, context=None):
        return x.chunk(2, 1)

    def inverse(self, x1, x2, context=None):
        return torch.cat((x1, x2), 1)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_halves_with_gaps_are_made_dense_in_exact_mode(fixed, memory_format):
    def branch():
        return nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))

    found, x = [], torch.randn(8, 8, 9, 9).contiguous(memory_format=memory_format)
    for activations in ("store", "reconstruct"):
        torch.manual_seed(0)
        halves = StridedHalves()
        halves.fixed = fixed
        net = ReversibleSequence(
            [halves, *(ReversibleBlock(branch(), branch()) for _ in range(3)), Merge()], activations
        )
        net(x).square().mean().backward()
        found.append([p.grad for p in net.parameters()])
    assert all(map(torch.equal, *found))
    assert net.reconstruction_error == 0


def test_a_squeeze_keeps_the_memory_format_where_the_kernels_of_a_device_do_not(monkeypatch):
    """Those of CUDA give tensors in torch's default format, whatever they are given."""
    for move in (F.pixel_shuffle, F.pixel_unshuffle):
        monkeypatch.setattr(squeeze, move.__name__, lambda x, factor, move=move: move(x, factor).contiguous())
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = Squeeze()(x)
    y.backward(torch.randn_like(y))
    undone = Squeeze().inverse(y)
    assert torch.equal(undone, x)
    assert [t.is_contiguous(memory_format=torch.channels_last) for t in (y, undone, x.grad)] == [True] * 3
