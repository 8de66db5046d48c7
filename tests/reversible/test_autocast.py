"""Autocast is replayed, and the residual stream stays in full precision."""

import pytest
import torch
from torch import nn

from revnet import AffineCoupling, ReversibleBlock, ReversibleSequence
from revnet.reversible import Merge, Split
from tests.reversible.networks import DEVICES, EVERY, EXACT, MODES, VALUES, blocks, relative, sequence


def between_contexts(activations, exact, forward, backward):
    """Output and gradients of a step whose passes run under autocast to these dtypes (None: without)."""
    net = sequence(activations, 2, 8, dtype=torch.float32, exact=exact)
    x = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    with torch.autocast("cpu", forward, enabled=forward is not None):
        y = net(x)
    loss = y.square().mean()
    with torch.autocast("cpu", backward, enabled=backward is not None):
        loss.backward()
    return y, [x.grad, *(p.grad for p in net.parameters())]


@MODES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_replayed_with_backward_outside_the_context(activations, exact, dtype):
    y, truth = between_contexts("store", exact, dtype, None)
    z, found = between_contexts(activations, exact, dtype, None)
    assert torch.equal(y, z)
    # Reconstructed inputs differ in the last bits of fp32; now and then one falls on the other side of a rounding.
    assert relative(found, truth) <= (2e-2 if activations == "reconstruct" and not exact else 0)
    _, full = between_contexts("store", exact, None, None)
    assert relative(truth, full) > 1e-4


@MODES
@pytest.mark.parametrize(
    ("forward", "backward"), [(None, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.bfloat16, torch.bfloat16)]
)
def test_backward_inside_another_context_replays_that_of_the_forward_pass(activations, exact, forward, backward):
    _, truth = between_contexts(activations, exact, forward, None)
    _, found = between_contexts(activations, exact, forward, backward)
    assert all(map(torch.equal, found, truth))


@EVERY
@EXACT
def test_autocast_keeps_the_residual_stream_in_float32(activations, exact):
    net = sequence(activations, dtype=torch.float32, exact=exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.randn(2, 8, 4, 4, dtype=torch.bfloat16)).dtype == torch.float32


@EVERY
def test_autocast_brings_halves_of_two_dtypes_together(activations):
    net = ReversibleSequence(blocks(2, 4, dtype=torch.float32), activations)
    with torch.autocast("cpu", torch.bfloat16):
        y1, y2 = net(torch.randn(2, 4, 4, 4, dtype=torch.bfloat16), torch.randn(2, 4, 4, 4))
    assert y1.dtype == y2.dtype == torch.float32


@EVERY
def test_a_stream_in_half_precision_is_kept_where_it_is_asked_for(activations):
    net = sequence(activations, dtype=torch.bfloat16)
    assert net(torch.randn(2, 8, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


@EVERY
@EXACT
def test_a_weight_used_twice_under_autocast_sums_its_gradient_in_float32(activations, exact):
    linear = nn.Linear(8, 8)
    layers = [Split(), ReversibleBlock(linear, linear), ReversibleBlock(linear, linear), Merge()]

    def gradient(value):
        x = torch.linspace(-1, 1, 64).view(4, 16)
        with torch.autocast("cpu", torch.bfloat16):
            y = ReversibleSequence(layers, value, exact)(x)
        return torch.autograd.grad(y.square().sum(), linear.weight)[0]

    found = gradient(activations)
    # A gradient summed in bf16 would have no digits beyond the eighth bit.
    assert not torch.equal(found, found.bfloat16().float())
    assert relative([found], [gradient("store")]) <= 1e-3


class HalfPrecision(nn.Linear):
    """Asks for half precision itself, and uses its weight twice."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(super().forward(x).tanh())


@pytest.mark.parametrize("activations", VALUES[1:])
@pytest.mark.parametrize("outer", [False, True], ids=["without", "within another"])
def test_a_branch_with_an_autocast_context_of_its_own_gets_the_gradients_of_store(activations, outer):
    def gradients(value):
        torch.manual_seed(4)
        layers = [ReversibleBlock(HalfPrecision(16, 16), HalfPrecision(16, 16)) for _ in range(2)]
        net, x = ReversibleSequence(layers, value, exact=True), torch.randn(2, 32, 16)
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            y1, y2 = net(*x)
        (y1 * y2).sum().backward()
        return [p.grad for p in net.parameters()]

    assert all(map(torch.equal, gradients(activations), gradients("store")))


class Affine(nn.Linear):
    def forward(self, x):
        log_scale, shift = super().forward(x).chunk(2, dim=1)
        return log_scale.tanh(), shift


class Widened(Affine):
    def forward(self, x):
        log_scale, shift = super().forward(x)
        return log_scale.float(), shift.float()


@pytest.mark.parametrize("activations", VALUES[1:])
def test_affine_couplings_scale_the_stream_in_float32(activations):
    def results(value, branch=Affine):
        torch.manual_seed(4)
        net = ReversibleSequence([AffineCoupling(branch(32, 64), swap=bool(i % 2)) for i in range(8)], value)
        with torch.autocast("cpu", torch.bfloat16):
            (y1, y2), log_det = net.forward_and_log_det(*torch.randn(2, 64, 32))
        (y1.square().sum() + y2.square().sum() - log_det.sum()).backward()
        return log_det, [p.grad for p in net.parameters()], net.reconstruction_error

    (truth_log_det, truth, _), (log_det, found, error) = results("store", Widened), results(activations)
    assert log_det.dtype == torch.float32
    assert torch.equal(log_det, truth_log_det)
    assert relative(found, truth) <= (2e-2 if activations == "reconstruct" else 0)
    assert error is None or error < 1e-3


@MODES
@DEVICES
def test_float16_with_a_gradient_scaler_gives_the_gradients_of_store(activations, exact, device):
    def gradients(value):
        net = sequence(value, 2, 8, dtype=torch.float32, exact=exact).to(device)
        optimizer = torch.optim.SGD(net.parameters(), 0.0)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
        torch.manual_seed(4)
        with torch.autocast(device, torch.float16):
            y = net(torch.randn(4, 16, 8, 8).to(device))
        scaler.scale(y.square().mean()).backward()
        scaler.unscale_(optimizer)
        return [p.grad for p in net.parameters()]

    bit_equal = exact or activations == "recompute"
    assert relative(gradients(activations), gradients("store")) <= (0 if bit_equal else 2e-2)
