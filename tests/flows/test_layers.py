"""Every layer of a flow: its log-determinant is that of its Jacobian, its inverse undoes it, and the engine agrees."""

import pytest
import torch

from revnet import AdditiveCoupling, AffineCoupling, ReversibleSequence
from revnet.flows import (
    MLP,
    ActNorm,
    CheckerboardBranch,
    CheckerboardSplit,
    Dequantise,
    Flatten,
    InvertibleConvolution,
    Logit,
    OddEvenSplit,
    OnHalf,
    ResidualNetwork,
    ScaleAndShift,
    Scaling,
    Squeeze,
)
from revnet.reversible import Merge, Split, invert
from tests.reversible.networks import relative

IMAGE = (2, 4, 4)


def checkerboard(coupling, outputs, swap=False):
    network = ResidualNetwork(2, outputs, 1, 8)
    branch = ScaleAndShift(network, 2) if outputs == 4 else network
    return [CheckerboardSplit(), coupling(CheckerboardBranch(branch, swap), swap), invert(CheckerboardSplit())]


def channels(coupling, outputs, swap=False):
    network = ResidualNetwork(1, outputs, 1, 8)
    branch = ScaleAndShift(network, 1) if outputs == 2 else network
    return [Split(), coupling(branch, swap), Merge()]


LAYERS = {
    "scaling": lambda: [Scaling(IMAGE)],
    "actnorm": lambda: [ActNorm(2)],
    "actnorm on a half": lambda: [Split(), OnHalf(ActNorm(1), 1), Merge()],
    "actnorm on vectors": lambda: [Flatten(IMAGE), ActNorm(32)],
    "convolution": lambda: [InvertibleConvolution(2)],
    "convolution on vectors": lambda: [Flatten(IMAGE), InvertibleConvolution(32)],
    "logit": lambda: [Logit()],
    "squeeze": lambda: [Squeeze()],
    "flatten, odd and even": lambda: [
        *(Flatten(IMAGE), OddEvenSplit(), AdditiveCoupling(MLP(16, 16, 8, 2)), invert(OddEvenSplit())),
    ],
    "affine on vectors": lambda: [
        *(Flatten(IMAGE), OddEvenSplit(), AffineCoupling(ScaleAndShift(MLP(16, 32, 8, 1), 16)), invert(OddEvenSplit())),
    ],
    "additive, checkerboard": lambda: checkerboard(AdditiveCoupling, 2),
    "affine, checkerboard": lambda: checkerboard(AffineCoupling, 4),
    "affine, checkerboard, swapped": lambda: checkerboard(AffineCoupling, 4, swap=True),
    "additive, channels": lambda: channels(AdditiveCoupling, 1),
    "affine, channels": lambda: channels(AffineCoupling, 2, swap=True),
}
EVERY_LAYER = pytest.mark.parametrize("name", LAYERS)


def build(name, activations="reconstruct"):
    """With parameters that are none of the beginning's zeros."""
    torch.manual_seed(1)
    sequence = ReversibleSequence(LAYERS[name](), activations).double()
    with torch.no_grad():
        for parameter in sequence.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    for module in sequence.modules():
        if isinstance(module, ActNorm | Scaling):
            module.initialised.fill_(True)
    return sequence


def images(number=2):
    return torch.rand(number, *IMAGE, dtype=torch.float64)


@EVERY_LAYER
def test_log_determinant_is_that_of_the_jacobian(name):
    sequence, x = build(name), images(1)
    jacobian = torch.autograd.functional.jacobian(lambda x: sequence(x).flatten(), x).view(32, 32)
    truth = torch.linalg.slogdet(jacobian)[1]
    y, log_det = sequence.forward_and_log_det(x)
    torch.testing.assert_close(log_det, truth[None])
    torch.testing.assert_close(sequence.inv.forward_and_log_det(y)[1], -truth[None])


@EVERY_LAYER
def test_inverse_undoes_forward(name):
    sequence, x = build(name), images()
    torch.testing.assert_close(sequence.inverse(sequence(x)), x)
    torch.testing.assert_close(sequence.inv(sequence(x)), x)


def gradients(sequence, x):
    x = x.clone().requires_grad_()
    y, log_det = sequence.forward_and_log_det(x)
    (y.square().mean() + log_det.sin().sum()).backward()
    return [x.grad, *(p.grad for p in sequence.parameters())]


@EVERY_LAYER
@pytest.mark.parametrize("activations", ["recompute", "reconstruct"])
def test_gradients_are_those_of_store_in_both_directions(name, activations):
    x = images()
    assert relative(gradients(build(name, activations), x), gradients(build(name, "store"), x)) <= 1e-10
    z = build(name)(x).detach()
    assert relative(gradients(build(name, activations).inv, z), gradients(build(name, "store").inv, z)) <= 1e-10


@pytest.mark.parametrize("name", ["flatten, odd and even", "additive, checkerboard", "additive, channels", "squeeze"])
def test_what_adds_or_rearranges_has_a_log_determinant_of_exactly_0(name):
    sequence = build(name)
    y, log_det = sequence.forward_and_log_det(images())
    assert torch.equal(log_det, torch.zeros_like(log_det))
    assert torch.equal(sequence.inv.forward_and_log_det(y)[1], torch.zeros_like(log_det))


@pytest.mark.parametrize("name", ["flatten, odd and even", "additive, checkerboard"])
def test_exact_mode_gives_back_every_bit(name):
    sequence, x = build(name).float(), torch.randint(2**16, (4, *IMAGE)) / 2**16
    sequence.exact = True
    assert torch.equal(sequence.inverse(sequence(x)), x)
    assert torch.equal(sequence.inv(sequence(x)), x)


def test_dequantise_has_the_log_determinant_of_its_jacobian():
    layer, x = Dequantise(), torch.randint(256, (1, *IMAGE)).double() / 255

    def function(x):
        torch.manual_seed(0)
        return layer(x).flatten()

    truth = torch.linalg.slogdet(torch.autograd.functional.jacobian(function, x).view(32, 32))[1]
    y, log_det = layer.forward_and_log_det(x)
    torch.testing.assert_close(log_det, truth[None])
    torch.testing.assert_close(layer.inverse_and_log_det(y)[1], -truth[None])
