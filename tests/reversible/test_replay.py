"""The second evaluation repeats the first and changes nothing outside."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from revnet import ReversibleBlock, ReversibleSequence, is_recomputing
from revnet.reversible import Merge, Split
from tests.reversible.networks import BRANCHES, basic, relative, sequence, step

SAVING = ("recompute", "reconstruct")


@pytest.mark.parametrize("activations", SAVING)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_normalisation_statistics_are_updated_once_a_step(activations, momentum):
    def after_steps(value):
        net = sequence(value)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
        for seed in range(3):
            step(
                net,
                torch.randn(4, 8, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),
            )
        return net.state_dict()

    truth, found = after_steps("store"), after_steps(activations)
    assert truth.keys() == found.keys()
    assert all(torch.equal(truth[name], found[name]) for name in truth)
    assert all(v == 3 for name, v in found.items() if name.endswith("num_batches_tracked"))


def test_update_bn_updates_statistics_without_gradients():
    def after(value):
        net = sequence(value)
        data = [
            torch.randn(4, 8, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(3)
        ]
        update_bn(data, net)
        return net.state_dict()

    truth, found = after("store"), after("reconstruct")
    assert all(torch.equal(truth[name], found[name]) for name in truth)
    assert all(v == 3 for name, v in found.items() if name.endswith("num_batches_tracked"))


class Fails(nn.Module):
    """Raises on its second evaluation, after its normalisation has run."""

    def __init__(self, channels):
        super().__init__()
        self.inner = basic(channels)

    def forward(self, x):
        y = self.inner(x)
        if is_recomputing():
            raise ArithmeticError("planned")
        return y


def test_statistics_and_parameters_are_restored_when_the_backward_pass_raises():
    net = sequence("reconstruct", branch=Fails)
    y = net(torch.randn(4, 8, 5, 5, dtype=torch.float64))
    parameters, before = list(net.parameters()), {k: v.clone() for k, v in net.state_dict().items()}
    buffers = list(net.buffers())
    with pytest.raises(ArithmeticError, match="planned"):
        y.sum().backward()
    assert all(p is q for p, q in zip(parameters, net.parameters(), strict=True))
    assert all(a is b for a, b in zip(buffers, net.buffers(), strict=True))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not is_recomputing()


@pytest.mark.parametrize("activations", SAVING)
@pytest.mark.parametrize("branch", [BRANCHES["dropout"], BRANCHES["droppath"]], ids=["dropout", "droppath"])
def test_random_branches_draw_the_same_numbers_and_leave_the_generator_as_store_does(activations, branch):
    x = torch.randn(6, 8, 5, 5, dtype=torch.float64)
    _, truth = step(sequence("store", branch=branch), x)
    state = torch.get_rng_state()
    _, found = step(sequence(activations, branch=branch), x)
    assert relative(found, truth) <= 1e-10
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("activations", SAVING)
def test_numbers_drawn_between_forward_and_backward_are_untouched(activations):
    net = sequence(activations, branch=BRANCHES["dropout"])
    y = net(torch.randn(2, 8, 4, 4, dtype=torch.float64))
    state = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("activations", SAVING)
def test_autocast_is_replayed_with_backward_outside_the_context(activations):
    x = torch.randn(4, 16, 8, 8)

    def gradients(value):
        net = sequence(value, 2, 8, dtype=torch.float32)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = net(leaf)
        y.square().mean().backward()
        return y, [leaf.grad, *(p.grad for p in net.parameters())]

    (y, truth), (z, found) = gradients("store"), gradients(activations)
    assert torch.equal(y, z)
    # Recomputed inputs are the stored ones to the bit. Reconstructed ones differ in the last bits of fp32; now
    # and then one falls on the other side of a rounding to bf16.
    assert relative(found, truth) <= (0 if activations == "recompute" else 2e-2)


def test_autocast_keeps_the_residual_stream_in_float32():
    net = sequence("reconstruct", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.randn(2, 8, 4, 4, dtype=torch.bfloat16)).dtype == torch.float32
    half = sequence("reconstruct", dtype=torch.bfloat16)
    assert half(torch.randn(2, 8, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_backward_inside_an_autocast_context_replays_full_precision():
    x = torch.randn(4, 8, 5, 5)

    def gradients(value):
        net = sequence(value, dtype=torch.float32)
        y = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            y.square().mean().backward()
        return [p.grad for p in net.parameters()]

    assert relative(gradients("reconstruct"), gradients("store")) <= 1e-3


def test_a_weight_used_twice_under_autocast_sums_its_gradient_in_float32():
    linear = nn.Linear(8, 8)

    def gradient(value):
        layers = [Split(), ReversibleBlock(linear, linear), ReversibleBlock(linear, linear), Merge()]
        net = ReversibleSequence(layers, value)
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = net(torch.linspace(-1, 1, 64).view(4, 16))
        y.square().sum().backward()
        return linear.weight.grad.clone()

    stored = gradient("store")
    assert torch.equal(gradient("recompute"), stored)
    # A gradient summed in bf16 would have no digits beyond the eighth bit.
    assert not torch.equal(stored, stored.bfloat16().float())


@pytest.mark.parametrize(("activations", "evaluations"), [("store", 1), ("recompute", 2), ("reconstruct", 2)])
def test_each_branch_is_evaluated_once_in_the_backward_pass(activations, evaluations):
    net = sequence(activations, depth=3)
    counts = {}
    for block in net[1:-1]:
        for name in "fg":
            branch = getattr(block, name)
            branch.register_forward_hook(lambda module, *_: counts.setdefault(module, []).append(is_recomputing()))
    step(net, torch.randn(2, 8, 4, 4, dtype=torch.float64))
    assert len(counts) == 6
    assert all(flags == [False, True][:evaluations] for flags in counts.values())


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


@pytest.mark.parametrize("activations", SAVING)
def test_buffers_that_an_evaluation_reads_and_changes(activations):
    x = torch.randn(3, 8, 4, 4, dtype=torch.float64)
    stored, net = sequence("store", branch=PowerIteration), sequence(activations, branch=PowerIteration)
    _, truth = step(stored, x)
    _, found = step(net, x)
    assert relative(found, truth) <= 1e-10
    assert all(torch.equal(a, b) for a, b in zip(stored.buffers(), net.buffers(), strict=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("activations", SAVING)
def test_half_precision_with_a_gradient_scaler(activations, device):
    def gradients(value):
        net = sequence(value, 2, 8, dtype=torch.float32).to(device)
        optimizer = torch.optim.SGD(net.parameters(), 0.0)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
        torch.manual_seed(4)
        with torch.autocast(device, torch.float16):
            y = net(torch.randn(4, 16, 8, 8).to(device))
        scaler.scale(y.square().mean()).backward()
        scaler.unscale_(optimizer)
        return [p.grad for p in net.parameters()]

    assert relative(gradients(activations), gradients("store")) <= (0 if activations == "recompute" else 2e-2)
