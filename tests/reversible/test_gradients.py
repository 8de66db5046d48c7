"""The gradients are those of ordinary backpropagation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from revnet import AffineCoupling, ReversibleBlock, ReversibleSequence
from revnet.reversible import Merge, Split
from tests.reversible.networks import BRANCHES, basic, blocks, layernorm, relative, sequence, step

VALUES = ("store", "recompute", "reconstruct")


@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES)
@pytest.mark.parametrize("activations", VALUES[1:])
def test_float64_gradients_equal_store(activations, branch):
    x = torch.randn(3, 8, 6, 6, dtype=torch.float64)
    _, truth = step(sequence("store", branch=branch), x)
    _, found = step(sequence(activations, branch=branch), x)
    assert relative(found, truth) <= 1e-10


def test_float32_gradients_at_16_units():
    x = torch.randn(8, 16, 8, 8)
    _, truth = step(sequence("store", 16, 8, dtype=torch.float32), x)
    _, found = step(sequence("reconstruct", 16, 8, dtype=torch.float32), x)
    assert relative(found, truth) <= 1e-3
    flat = [torch.cat([g.flatten() for g in gs]) for gs in (found, truth)]
    assert torch.cosine_similarity(*flat, dim=0) >= 0.9999


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    plan=st.lists(st.sampled_from(VALUES), min_size=1, max_size=6),
    channels=st.integers(1, 5),
    branch=st.sampled_from(sorted(BRANCHES)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_gradients_over_random_networks_and_plans(plan, channels, branch, dtype, memory_format):
    x = torch.randn(4, 2 * channels, 5, 5, dtype=dtype).contiguous(memory_format=memory_format)
    y, truth = step(sequence("store", len(plan), channels, BRANCHES[branch], dtype), x)
    mixed = sequence(["reconstruct", *plan, "recompute"], len(plan), channels, BRANCHES[branch], dtype)
    z, found = step(mixed, x)
    assert torch.equal(y, z)
    assert relative(found, truth) <= (1e-10 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("activations", VALUES[1:])
def test_gradcheck(activations):
    net = sequence(activations, depth=2, channels=2)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(net, (x,), fast_mode=True)


@pytest.mark.parametrize(("shape", "dim"), [((4, 6, 8), 2), ((4, 8, 7), 1), ((2, 8, 3, 4, 5), 1)])
def test_any_rank_and_split_dimension(shape, dim):
    branch = layernorm if dim == 2 else lambda c: (nn.Conv1d if len(shape) == 3 else nn.Conv3d)(c, c, 3, padding=1)
    x = torch.randn(shape, dtype=torch.float64)
    y, truth = step(sequence("store", branch=branch, dim=dim), x)
    z, found = step(sequence("reconstruct", branch=branch, dim=dim), x)
    assert torch.equal(y, z)
    assert relative(found, truth) <= 1e-10


@pytest.mark.parametrize(
    "activations", ["store", "recompute", "reconstruct", ["reconstruct", "store", "recompute"] * 2]
)
def test_forward_is_bit_identical_to_store(activations):
    x = torch.randn(4, 8, 6, 6)
    y, _ = step(sequence("store", dtype=torch.float32), x)
    z, _ = step(sequence(activations, dtype=torch.float32), x)
    assert torch.equal(y, z)


class Conditional(nn.Module):
    """A branch with extra inputs: a tensor and a table of tensors."""

    def __init__(self, channels):
        super().__init__()
        self.inner = basic(channels)
        self.embed = nn.Linear(3, channels)

    def forward(self, x, context):
        tokens, rest = context
        return self.inner(x) + (self.embed(tokens) * rest["scale"])[..., None, None]


@pytest.mark.parametrize(
    "activations", [*VALUES, ["reconstruct", "recompute", "store", "reconstruct", "store", "recompute"]]
)
def test_gradients_reach_the_context(activations):
    def gradients(value):
        net = sequence(value, branch=Conditional)
        torch.manual_seed(3)
        tokens = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
        scale = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
        x = torch.randn(3, 8, 5, 5, dtype=torch.float64)
        _, found = step(net, x, context=(tokens, {"scale": scale, "name": "kept as it is"}))
        return [*found, tokens.grad, scale.grad]

    assert relative(gradients(activations), gradients("store")) <= 1e-10


class Scale(nn.Module):
    """A user's own bijection: y = x * exp(s), with its log-determinant."""

    def __init__(self, channels):
        super().__init__()
        self.log_scale = nn.Parameter(torch.linspace(-0.5, 0.5, channels, dtype=torch.float64))

    def forward(self, x1, x2):
        return x1 * self._factor, x2 * self._factor

    @property
    def _factor(self):
        return self.log_scale.exp()[:, None, None]

    def inverse(self, y1, y2):
        return y1 / self._factor, y2 / self._factor

    def forward_and_log_det(self, x1, x2):
        return self(x1, x2), (2 * self.log_scale.sum() * x1[0, 0].numel()).expand(x1.shape[0])


class Affine(nn.Conv2d):
    def __init__(self, channels):
        super().__init__(channels, 2 * channels, 3, padding=1, dtype=torch.float64)

    def forward(self, x):
        log_scale, shift = super().forward(x).chunk(2, dim=1)
        return log_scale.tanh(), shift


def mixed_layers():
    """Every kind of layer: bijections, couplings, a user's bijection, a layer without an inverse."""
    with torch.random.fork_rng([]):
        torch.manual_seed(11)
        return [
            Split(),
            *blocks(1, 4),
            Scale(4),
            AffineCoupling(Affine(4)),
            AffineCoupling(Affine(4), swap=True),
            *blocks(1, 4),
            Merge(),
        ]


@pytest.mark.parametrize("activations", VALUES[1:])
def test_log_determinant_and_its_gradients(activations):
    x = torch.randn(3, 8, 4, 4, dtype=torch.float64)

    def gradients(value):
        net = ReversibleSequence(mixed_layers(), value)
        leaf = x.clone().requires_grad_()
        y, log_det = net.forward_and_log_det(leaf)
        (y.square().sum() - (log_det * torch.arange(3)).sum()).backward()
        return log_det, [leaf.grad, *(p.grad for p in net.parameters())]

    (truth_log_det, truth), (log_det, found) = gradients("store"), gradients(activations)
    assert torch.equal(log_det, truth_log_det)
    assert relative(found, truth) <= 1e-10


def test_log_determinant_is_that_of_the_jacobian():
    net = ReversibleSequence(mixed_layers()).eval()
    x = torch.randn(1, 8, 2, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda flat: net(flat.view_as(x)).flatten(), x.flatten())
    _, log_det = net.forward_and_log_det(x)
    assert torch.allclose(log_det[0], torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-8)


def test_log_determinant_of_an_additive_stack_is_exactly_zero():
    _, log_det = sequence("reconstruct").forward_and_log_det(torch.randn(3, 8, 4, 4, dtype=torch.float64))
    assert torch.equal(log_det, torch.zeros(3, dtype=torch.float64))


def test_inverse_undoes_forward():
    net = ReversibleSequence(mixed_layers()).eval()
    x = torch.randn(3, 8, 4, 4, dtype=torch.float64)
    assert torch.allclose(net.inverse(net(x)), x, atol=1e-10)


class Strided(nn.Module):
    """A layer without an inverse, from halves to halves."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1, dtype=torch.float64)

    def forward(self, x1, x2):
        return self.conv(x1), self.conv(x2)


def test_a_layer_without_inverse_is_recomputed_inside_a_reconstructed_sequence():
    def layers():
        with torch.random.fork_rng([]):
            torch.manual_seed(2)
            return [Split(), *blocks(2, 4), Strided(4), *blocks(2, 4), Merge()]

    x = torch.randn(3, 8, 6, 6, dtype=torch.float64)
    net = ReversibleSequence(layers(), "reconstruct")
    _, truth = step(ReversibleSequence(layers(), "store"), x)
    _, found = step(net, x)
    assert relative(found, truth) <= 1e-10
    assert net.plan() == ("reconstruct",) * 3 + ("recompute",) + ("reconstruct",) * 3


def test_a_sequence_of_couplings_takes_and_returns_two_halves():
    x1, x2 = (torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    net = ReversibleSequence(blocks(3, 4))
    y1, y2 = net(x1, x2)
    stored = ReversibleSequence(blocks(3, 4), "store")
    z1, z2 = stored(x1, x2)
    assert torch.equal(y1, z1)
    assert torch.equal(y2, z2)
    found = torch.autograd.grad((y1 * y2).sum(), [x1, x2, *net.parameters()])
    truth = torch.autograd.grad((z1 * z2).sum(), [x1, x2, *stored.parameters()])
    assert relative(found, truth) <= 1e-10


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_unused(used):
    def gradients(activations):
        x1, x2 = (torch.linspace(-1, 1, 200, dtype=torch.float64).view(2, 4, 5, 5).requires_grad_() for _ in range(2))
        net = ReversibleSequence(blocks(2, 4), activations)
        net(x1, x2)[used].square().sum().backward()
        return [x1.grad, x2.grad, *(p.grad for p in net.parameters())]

    found, truth = gradients("reconstruct"), gradients("store")
    assert [g is None for g in found] == [g is None for g in truth]
    assert relative([g for g in found if g is not None], [g for g in truth if g is not None]) <= 1e-10


def test_a_branch_that_is_the_identity():
    """Its gradient is the very tensor of the stream's gradient: nothing may be summed in place."""

    def gradients(activations):
        x = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        net = ReversibleSequence([Split(), ReversibleBlock(nn.Identity(), nn.Identity()), Merge()], activations)
        net(x).pow(3).sum().backward()
        return [x.grad]

    assert relative(gradients("reconstruct"), gradients("store")) <= 1e-12


def test_a_module_shared_by_all_blocks_sums_its_gradients():
    def gradients(activations):
        shared = basic(4).double()
        with torch.random.fork_rng([]):
            torch.manual_seed(4)
            for p in shared.parameters():
                nn.init.normal_(p, std=0.3)
        net = ReversibleSequence([Split(), *[ReversibleBlock(shared, shared) for _ in range(3)], Merge()], activations)
        x = torch.linspace(-1, 1, 3 * 8 * 25, dtype=torch.float64).view(3, 8, 5, 5)
        return step(net, x)[1]

    assert relative(gradients("reconstruct"), gradients("store")) <= 1e-10
