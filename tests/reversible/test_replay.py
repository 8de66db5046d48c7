"""The second evaluation repeats the first and changes nothing outside."""

import pytest
import torch
from torch import nn

from revnet import is_recomputing
from tests.reversible.networks import BRANCHES, DEVICES, EVERY, EXACT, MODES, basic, same, sequence, step

RANDOM = pytest.mark.parametrize("branch", [BRANCHES["dropout"], BRANCHES["droppath"]], ids=["dropout", "droppath"])


@pytest.fixture
def x():
    return torch.randn(4, 8, 5, 5, dtype=torch.float64)


def random_states(device):
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if device == "cuda" else [])


@MODES
@RANDOM
@DEVICES
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
            branch.register_forward_hook(lambda module, *_: counts.setdefault(module, []).append(is_recomputing()))
    step(net, x)
    assert list(counts.values()) == [[False] if activations == "store" else [False, True]] * 6


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
