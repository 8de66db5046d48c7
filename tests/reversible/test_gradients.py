"""The gradients are those of ordinary backpropagation, and the output is its output to the bit."""

import pytest
import torch
from torch import nn

from revnet import ReversibleBlock, ReversibleSequence
from revnet.reversible import Merge, Split
from tests.reversible.networks import (
    BRANCHES,
    EVERY,
    MODES,
    basic,
    blocks,
    curved,
    relative,
    same,
    sequence,
    step,
    tokens,
)


@pytest.fixture
def x():
    return torch.randn(3, 8, 6, 6, dtype=torch.float64)


@MODES
@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES)
def test_float64_gradients_equal_store(activations, exact, branch, x):
    _, truth = step(sequence("store", branch=branch, exact=exact), x)
    _, found = step(sequence(activations, branch=branch, exact=exact), x)
    assert same(found, truth, exact)


@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_recomputed_gradients_are_those_of_store_to_the_bit_without_the_grid_too(branch, autocast):
    x, found = torch.randn(4, 8, 6, 6), []
    for activations in ("store", "recompute"):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(step(sequence(activations, 4, 4, branch, torch.float32, exact=False), x)[1])
    assert all(map(torch.equal, *found))


@MODES
def test_float32_gradients_of_16_units_equal_store(activations, exact):
    x = torch.randn(8, 16, 8, 8)
    _, truth = step(sequence("store", 16, 8, dtype=torch.float32, exact=exact), x)
    _, found = step(sequence(activations, 16, 8, dtype=torch.float32, exact=exact), x)
    assert relative(found, truth) <= (0 if exact else 1e-3)
    flat = [torch.cat([g.flatten() for g in gs]) for gs in (found, truth)]
    assert torch.cosine_similarity(*flat, dim=0) >= 0.9999


@MODES
def test_gradcheck(activations, exact):
    net = sequence(activations, 2, 2, curved, exact=exact)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    # On the grid finite differences need a step beside which its steps vanish.
    assert torch.autograd.gradcheck(net, (x,), eps=1e-4 if exact else 1e-6, fast_mode=True)


@EVERY
def test_exact_gradients_are_those_without_the_grid_up_to_its_rounding(activations, x):
    _, truth = step(sequence("store", branch=curved), x)
    _, found = step(sequence(activations, branch=curved, exact=True), x)
    assert 0 < relative(found, truth) <= 1e-8


@MODES
@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_forward_is_bit_identical_to_store(activations, exact, branch, autocast):
    x = torch.randn(4, 8, 6, 6)
    mixed = [activations, "store", "recompute", activations, "store", "reconstruct"]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, *others = (
            step(sequence(value, 4, 4, branch, torch.float32, exact=exact), x)[0]
            for value in ("store", activations, mixed)
        )
    assert all(torch.equal(y, z) for z in others)


@MODES
@pytest.mark.parametrize(
    ("shape", "dim", "branch"),
    [
        ((4, 8), 1, lambda c: basic(c, 0)),
        ((4, 8, 7), 1, lambda c: basic(c, 1)),
        ((2, 8, 3, 4, 5), 1, lambda c: basic(c, 3)),
        ((4, 6, 8), 2, tokens),
        ((2, 3, 4, 8), -1, tokens),
    ],
    ids=["features", "series", "volumes", "tokens", "grid of tokens"],
)
def test_any_rank_and_split_dimension(activations, exact, shape, dim, branch):
    x = torch.randn(shape, dtype=torch.float64)
    y, truth = step(sequence("store", branch=branch, dim=dim, exact=exact), x)
    z, found = step(sequence(activations, branch=branch, dim=dim, exact=exact), x)
    assert torch.equal(y, z)
    assert same(found, truth, exact)


class Conditional(nn.Module):
    """A branch with extra inputs: a tensor and a table of tensors."""

    def __init__(self, channels):
        super().__init__()
        self.inner = basic(channels)
        self.embed = nn.Linear(3, channels)

    def forward(self, x, context):
        tokens, rest = context
        return self.inner(x) + (self.embed(tokens) * rest["scale"])[..., None, None]


@MODES
def test_gradients_reach_the_context(activations, exact, x):
    def gradients(value):
        net = sequence(value, branch=Conditional, exact=exact)
        torch.manual_seed(3)
        tokens = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
        scale = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
        _, found = step(net, x, context=(tokens, {"scale": scale, "name": "kept as it is"}))
        return [*found, tokens.grad, scale.grad]

    truth = gradients("store")
    for plan in (activations, ["reconstruct", activations, "store", "reconstruct", activations, "store"]):
        found = gradients(plan)
        assert same(found[:-2], truth[:-2], exact)
        # What several layers share is summed layer by layer and run by run: in another order than that of store.
        assert same(found[-2:], truth[-2:], exact=False)


@MODES
def test_a_sequence_of_couplings_takes_and_returns_two_halves(activations, exact):
    x1, x2 = torch.randn(2, 2, 4, 5, 5, dtype=torch.float64)

    def results(value):
        net = ReversibleSequence(blocks(3, 4), value, exact)
        leaves = [x.clone().requires_grad_() for x in (x1, x2)]
        y1, y2 = net(*leaves)
        return (y1, y2), torch.autograd.grad((y1 * y2).sum(), [*leaves, *net.parameters()])

    (outputs, found), (expected, truth) = results(activations), results("store")
    assert all(map(torch.equal, outputs, expected))
    assert same(found, truth, exact)


@MODES
def test_a_branch_that_is_the_identity(activations, exact):
    """Its gradient is the very tensor of the stream's gradient: nothing may be summed in place."""
    layers = [Split(), ReversibleBlock(nn.Identity(), nn.Identity()), Merge()]
    x = torch.randn(2, 4, dtype=torch.float64)
    _, truth = step(ReversibleSequence(layers, "store", exact), x, loss=lambda y: y.pow(3).sum())
    _, found = step(ReversibleSequence(layers, activations, exact), x, loss=lambda y: y.pow(3).sum())
    assert same(found, truth, exact)


@MODES
def test_a_module_shared_by_all_blocks_sums_its_gradients(activations, exact, x):
    shared = basic(4).double()

    def gradients(value):
        net = ReversibleSequence([Split(), *[ReversibleBlock(shared, shared) for _ in range(3)], Merge()], value, exact)
        return step(net, x)[1]

    found, truth = gradients(activations), gradients("store")
    assert same(found[:1], truth[:1], exact)
    # A recomputed block sums the gradients of its own two branches first.
    assert same(found[1:], truth[1:], exact and activations == "reconstruct")
