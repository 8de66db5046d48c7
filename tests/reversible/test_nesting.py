"""Sequences inside sequences, inside checkpoint and around it, and weights that are computed."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from revnet import ReversibleBlock, ReversibleSequence
from revnet.reversible import Merge, Split
from tests.reversible.networks import BRANCHES, EXACT, MODES, VALUES, same, sequence, step


@pytest.fixture
def x():
    return torch.randn(3, 8, 4, 4, dtype=torch.float64)


class Around(nn.Module):
    """A module that hands its input on through a function."""

    def __init__(self, inner, function):
        super().__init__()
        self.inner = inner
        self.function = function

    def forward(self, x):
        return self.function(self.inner, x)


@MODES
@pytest.mark.parametrize("inner", VALUES)
def test_a_sequence_inside_a_sequence(activations, exact, inner, x):
    def nested(outer, inner):
        net = sequence(outer, 2, 4, exact=exact)
        for block in net[1:-1]:
            block.f = sequence(inner, 2, 2, exact=exact)
        return net

    y, truth = step(nested("store", "store"), x)
    z, found = step(nested(activations, inner), x)
    assert torch.equal(y, z)
    assert same(found, truth, exact)


class Conditional(nn.Linear):
    """A branch that adds the context."""

    def forward(self, x, context=None):
        return super().forward(x).tanh() + (0 if context is None else context)


@MODES
@pytest.mark.parametrize("inner", VALUES)
def test_a_sequence_inside_a_sequence_gets_the_context(activations, exact, inner):
    """As the same layers written out by hand do."""

    def nested(outer, inner):
        torch.manual_seed(1)
        parts = [ReversibleBlock(Conditional(2, 2), Conditional(2, 2)) for _ in range(2)]
        f = ReversibleSequence([Split(), *parts, Merge()], inner, exact)
        return ReversibleSequence([ReversibleBlock(f, Conditional(4, 4))], outer, exact).double(), parts

    def gradients(network, parts, by_hand=False):
        x1, x2, context = (torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4) * i for i in (1, 2, 3))
        context = context[:, :1].clone().requires_grad_()
        if by_hand:
            h = x2.chunk(2, 1)
            for part in parts:
                h = part(*h, context)
            y1 = x1 + torch.cat(h, 1)
            y2 = x2 + network[0].g(y1, context)
        else:
            y1, y2 = network(x1, x2, context=context)
        (y1.square().sum() + y2.square().sum()).backward()
        return [context.grad, *(p.grad for p in network.parameters())]

    truth = gradients(*nested("store", "store"), by_hand=True)
    found = gradients(*nested(activations, inner))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("activations", VALUES)
def test_a_second_tensor_for_a_sequence_on_one_is_refused(activations):
    network = ReversibleSequence([Split(), ReversibleBlock(Conditional(2, 2), Conditional(2, 2)), Merge()], activations)
    with pytest.raises(TypeError):
        network(torch.randn(3, 4), torch.randn(3, 4))


@MODES
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_sequence_inside_checkpoint(activations, exact, use_reentrant, x):
    def checkpointed(net, x):
        return checkpoint(net, x, use_reentrant=use_reentrant)

    nets = {v: sequence(v, branch=BRANCHES["dropout"], exact=exact) for v in (activations, "store")}
    _, truth = step(nets["store"], x)
    _, found = step(Around(nets[activations], checkpointed), x)
    assert same(found, truth, exact)


@MODES
def test_checkpoint_inside_a_branch(activations, exact, x):
    def build(value):
        net = sequence(value, branch=BRANCHES["dropout"], exact=exact)
        for block in net[1:-1]:
            block.f = Around(block.f, lambda module, x: checkpoint(module, x, use_reentrant=False))
        return net

    _, truth = step(sequence("store", branch=BRANCHES["dropout"], exact=exact), x)
    _, found = step(build(activations), x)
    assert same(found, truth, exact)


@EXACT
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_reentrant_checkpoint_inside_a_reconstructed_branch_is_torchs_clear_error(exact, x):
    net = sequence("reconstruct", exact=exact)
    net[2].f = Around(net[2].f, lambda module, x: checkpoint(module, x, use_reentrant=True))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        step(net, x)


@EXACT
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_reentrant_checkpoint_inside_a_recomputed_branch_has_the_gradients_of_store(exact, x):
    net = sequence("recompute", exact=exact)
    net[2].f = Around(net[2].f, lambda module, x: checkpoint(module, x, use_reentrant=True))
    assert all(map(torch.equal, step(net, x)[1], step(sequence("store", exact=exact), x)[1]))


@MODES
@pytest.mark.parametrize("parametrization", [spectral_norm, weight_norm])
def test_parametrised_weights(activations, exact, parametrization, x):
    def branch(channels):
        return nn.Sequential(parametrization(nn.Conv2d(channels, channels, 3, padding=1)), nn.Tanh())

    stored, net = (sequence(value, branch=branch, exact=exact) for value in ("store", activations))
    for _ in range(2):
        _, truth = step(stored, x)
        _, found = step(net, x)
    assert same(found, truth, exact)
    assert all(map(torch.equal, net.buffers(), stored.buffers()))


@MODES
def test_cached_parametrizations_get_their_gradients(activations, exact, x):
    def gradients(value):
        net = sequence(value, branch=lambda c: weight_norm(nn.Conv2d(c, c, 1)), exact=exact)
        with nn.utils.parametrize.cached():
            return step(net, x)[1]

    assert same(gradients(activations), gradients("store"), exact)


@pytest.mark.parametrize("activations", ["recompute", "reconstruct"])
def test_a_sequence_with_a_layer_without_an_inverse_is_recomputed_as_a_layer(activations):
    found = []
    for value in (activations, "store"):
        torch.manual_seed(0)
        inner = ReversibleSequence([Swap(), block()], value, exact=False)
        network = ReversibleSequence([block(), inner, block()], value, exact=False)
        assert not inner.has_inverse
        sum(y.square().sum() for y in network(*torch.randn(2, 5, 4, dtype=torch.float64))).backward()
        found.append([p.grad for p in network.parameters()])
    assert network.plan() == ("store",) * 3
    assert all(map(torch.allclose, *found))


class Swap(nn.Module):
    """Has no inverse."""

    def forward(self, x1, x2):
        return x2, x1


def block():
    return ReversibleBlock(*(nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), nn.Tanh()) for _ in range(2)))
