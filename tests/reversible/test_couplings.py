"""Log-determinants and inverses of sequences of every kind of layer."""

import pytest
import torch
from torch import nn

from revnet import AffineCoupling, ReversibleSequence
from revnet.reversible import Merge, Split
from tests.reversible.networks import MODES, VALUES, blocks, relative, sequence


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


@MODES
def test_log_determinant_of_an_additive_stack_is_exactly_zero(activations, exact):
    _, log_det = sequence(activations, exact=exact).forward_and_log_det(torch.randn(3, 8, 4, 4, dtype=torch.float64))
    assert torch.equal(log_det, torch.zeros(3, dtype=torch.float64))


def test_inverse_undoes_forward():
    net = ReversibleSequence(mixed_layers()).eval()
    x = torch.randn(3, 8, 4, 4, dtype=torch.float64)
    assert torch.allclose(net.inverse(net(x)), x, atol=1e-10)
