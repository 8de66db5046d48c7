"""The second evaluation repeats the first and changes nothing outside."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from revnet import ReversibleSequence, is_recomputing
from revnet.reversible import Merge, Split
from tests.reversible.networks import (
    BRANCHES,
    DEVICES,
    EVERY,
    EXACT,
    MODES,
    basic,
    blocks,
    curved,
    same,
    sequence,
    step,
    tokens,
)

RANDOM = pytest.mark.parametrize("branch", [BRANCHES["dropout"], BRANCHES["droppath"]], ids=["dropout", "droppath"])


@pytest.fixture
def x():
    return torch.randn(4, 8, 5, 5, dtype=torch.float64)


def random_states(device):
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if device == "cuda" else [])


@MODES
@RANDOM
@DEVICES
@pytest.mark.usefixtures("deterministic")
def test_random_branches_draw_the_same_numbers_and_leave_the_generators_as_store_does(
    activations, exact, branch, device
):
    x = torch.randn(6, 8, 5, 5, dtype=torch.float64).to(device)
    y, truth = step(sequence("store", branch=branch, exact=exact).to(device), x)
    states = random_states(device)
    z, found = step(sequence(activations, branch=branch, exact=exact).to(device), x)
    assert torch.equal(y, z)
    assert same(found, truth, exact)
    assert all(map(torch.equal, random_states(device), states))


@MODES
@RANDOM
@DEVICES
def test_numbers_drawn_between_the_passes_are_untouched(activations, exact, branch, device):
    net = sequence(activations, branch=branch, exact=exact).to(device)
    y = net(torch.randn(2, 8, 4, 4, dtype=torch.float64).to(device))
    torch.rand(5, device=device)
    states = random_states(device)
    y.sum().backward()
    assert all(map(torch.equal, random_states(device), states))


@EVERY
@EXACT
def test_each_branch_is_evaluated_once_in_the_backward_pass(activations, exact, x):
    net, counts = sequence(activations, depth=3, exact=exact), {}
    for block in net[1:-1]:
        for branch in (block.f, block.g):
            branch.register_forward_pre_hook(lambda module, _: counts.setdefault(module, []).append(is_recomputing()))
    step(net, x)
    assert list(counts.values()) == [[False] if activations == "store" else [False, True]] * 6


@EXACT
def test_splits_and_merges_are_not_evaluated_again_and_the_input_is_not_put_together_again(exact, x, monkeypatch):
    net, evaluated = sequence("reconstruct", depth=1, exact=exact), []
    methods = {(kind, name): getattr(kind, name) for kind in (Split, Merge) for name in ("forward", "inverse")}
    for kind, name in methods:

        def noting(self, *state, note=(kind, name), method=methods[kind, name], **kwargs):
            evaluated.append(note)
            return method(self, *state, **kwargs)

        monkeypatch.setattr(kind, name, noting)
    _, found = step(net, x)
    # Of the Merge state and gradients are moved back, of the Split the gradients alone.
    assert evaluated == [(Split, "forward"), (Merge, "forward"), *[(Merge, "inverse")] * 2, (Split, "inverse")]
    assert same(found, step(sequence("store", depth=1, exact=exact), x)[1], exact)


@EXACT
def test_the_second_evaluation_of_a_recomputed_block_ends_ahead_of_its_last_convolution(exact, x):
    net, ended = sequence("recompute", depth=1, exact=exact), []
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, *_: ended.append(module) if is_recomputing() else None)
    step(net, x)
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) > 1
    assert ended == convolutions[:-1]


class PowerIteration(nn.Module):
    """A buffer that every evaluation changes and that the next one reads, as in spectral normalisation."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels))
        self.register_buffer("u", torch.ones(channels))

    def forward(self, x):
        with torch.no_grad():
            self.u.copy_(nn.functional.normalize(self.weight @ self.u, dim=0))
        return torch.einsum("nc...,dc->nd...", x, self.weight / (1 + self.u.dot(self.weight @ self.u).abs()))


@MODES
def test_buffers_that_an_evaluation_reads_and_changes(activations, exact, x):
    stored, net = (sequence(value, branch=PowerIteration, exact=exact) for value in ("store", activations))
    _, truth = step(stored, x)
    _, found = step(net, x)
    assert same(found, truth, exact)
    assert all(map(torch.equal, stored.buffers(), net.buffers()))


@MODES
def test_buffers_that_an_evaluation_reads_and_changes_in_interleaved_micro_batches(activations, exact):
    batches = torch.randn(3, 4, 8, 5, 5, dtype=torch.float64)
    stored, net = (sequence(value, branch=PowerIteration, exact=exact) for value in ("store", activations))
    for x in batches:  # one after the other: autograd itself has no second use for a buffer that has changed
        stored(x).square().sum().backward()
    for loss in [net(x).square().sum() for x in batches]:
        loss.backward()
    assert same([p.grad for p in net.parameters()], [p.grad for p in stored.parameters()], exact)
    assert all(map(torch.equal, stored.buffers(), net.buffers()))


class Masked(nn.Module):
    """Reads a buffer that it leaves alone."""

    def __init__(self, channels):
        super().__init__()
        self.inner = curved(channels)
        self.register_buffer("mask", torch.ones(channels, 1, 1))

    def forward(self, x):
        return self.inner(x) * self.mask


@MODES
def test_a_buffer_that_is_changed_in_place_between_the_passes_is_named(activations, exact, x):
    net = sequence(activations, branch=Masked, exact=exact)
    step(net, x)
    net[2].g.mask.mul_(3)  # between two steps it may be
    step(net, x)
    y = net(x)
    net[2].g.mask.mul_(3)
    named = r"buffer 'mask' of Masked in a reversible sequence was changed in place between .*activations=\"store\""
    with pytest.raises(RuntimeError, match=named):
        y.sum().backward()


@MODES
def test_a_buffer_that_is_replaced_between_the_passes_is_read_as_it_was(activations, exact, x):
    def gradients(value):
        net = sequence(value, branch=Masked, exact=exact)
        y = net(x)
        net[2].g.mask = 3 * net[2].g.mask
        y.square().sum().backward()
        assert (net[2].g.mask == 3).all()
        return [p.grad for p in net.parameters()]

    assert same(gradients(activations), gradients("store"), exact)


@MODES
def test_functional_call_reads_the_buffers_that_it_is_given(activations, exact, x):
    def gradients(value):
        net = sequence(value, branch=Masked, exact=exact)
        buffers = {name: b + 1 for name, b in net.named_buffers()}
        functional_call(net, buffers, (x,)).square().sum().backward()
        return [p.grad for p in net.parameters()]

    assert same(gradients(activations), gradients("store"), exact)


class Positions(nn.Module):
    """Shortens the vectors of its embedding, which it adds to its input, where they are too long."""

    def __init__(self, channels):
        super().__init__()
        self.inner = tokens(channels)
        self.embedding = nn.Embedding(6, channels, max_norm=0.5)

    def forward(self, x):
        return self.inner(x) + self.embedding(torch.arange(x.shape[1]))


@MODES
def test_a_branch_that_writes_to_a_parameter_in_the_forward_pass(activations, exact):
    x = torch.randn(4, 6, 8, dtype=torch.float64)
    stored, net = (sequence(value, branch=Positions, dim=-1, exact=exact) for value in ("store", activations))
    before = stored[2].f.embedding.weight.clone()
    for _ in range(2):
        _, truth = step(stored, x)
        _, found = step(net, x)
        assert same(found, truth, exact)
    assert all(map(torch.equal, net.parameters(), stored.parameters()))
    assert not torch.equal(net[2].f.embedding.weight, before)


@MODES
def test_a_recomputed_layer_that_writes_to_a_parameter_in_the_forward_pass(activations, exact):
    words = torch.randint(10, (4, 6))

    def gradients(value):
        torch.manual_seed(3)
        embedding = nn.Embedding(10, 8, max_norm=0.5, dtype=torch.float64)
        net = ReversibleSequence([embedding, Split(-1), *blocks(2, 4, tokens), Merge(-1)], value, exact)
        net(words).square().sum().backward()
        return [p.grad for p in net.parameters()]

    assert same(gradients(activations), gradients("store"), exact)


@MODES
@pytest.mark.parametrize("branch", [basic, BRANCHES["dropout"]], ids=["basic", "dropout"])
def test_a_mode_switched_between_the_passes_does_not_matter(activations, exact, branch, x):
    def gradients(value, switch):
        net, leaf = sequence(value, branch=branch, exact=exact), x.clone().requires_grad_()
        torch.manual_seed(4)
        loss = net(leaf).square().sum()
        net.train(not switch)
        loss.backward()
        assert all(m.training != switch for m in net.modules())
        return [leaf.grad, *(p.grad for p in net.parameters())]

    assert same(gradients(activations, True), gradients("store", False), exact)


@MODES
def test_statistics_changed_between_the_passes_in_eval_mode_do_not_matter(activations, exact, x):
    net, leaf = sequence(activations, exact=exact).eval(), x.clone().requires_grad_()
    _, truth = step(net, x)
    net.zero_grad()
    loss = net(leaf).square().mean()
    net.train()
    with torch.no_grad():
        net(5 + 3 * x)
    loss.backward()
    assert same([leaf.grad, *(p.grad for p in net.parameters())], truth, exact)


@MODES
def test_exact_switched_between_the_passes_does_not_matter(activations, exact, x):
    net = sequence(activations, exact=exact)
    _, (_, *truth) = step(net, x)
    net.zero_grad()
    loss = net(x).square().mean()
    net.exact = not exact
    with torch.no_grad():
        net(x)
    loss.backward()
    assert all(map(torch.equal, [p.grad for p in net.parameters()], truth))
