import pytest
import torch

from revnet.flows import CheckerboardBranch, Logit, realnvp
from revnet.reversible import AffineCoupling


def layers(flow, kind):
    return [[layer for layer in stage if isinstance(layer, kind)] for stage in flow.stages]


def test_it_is_the_network_of_the_paper():
    with torch.device("meta"):
        flow = realnvp((3, 32, 32))
    first, last = layers(flow, AffineCoupling)
    kinds = [isinstance(layer.branch, CheckerboardBranch) for layer in first]
    assert kinds == [True] * 3 + [False] * 3
    assert [isinstance(layer.branch, CheckerboardBranch) for layer in last] == [True] * 4
    assert flow.latent_shapes == ((6, 16, 16), (6, 16, 16))
    assert isinstance(flow.stages[0][0], Logit)
    networks = [module for module in flow.modules() if type(module).__name__ == "ResidualNetwork"]
    assert {len(n.blocks) for n in networks} == {8}
    assert [n.first.out_channels for n in networks] == [64] * 3 + [128] * 7  # doubled behind the squeeze (section 3.6)


def test_at_first_the_couplings_change_nothing():
    flow = realnvp((2, 4, 4), blocks=1, width=8, dequantise=False, logit=None).eval()
    x = torch.randn(2, 2, 4, 4)
    assert torch.equal(flow.decode(flow.encode(x)), x)
    assert torch.equal(flow.encode_and_log_det(x)[1], torch.zeros(2))


def test_the_density_of_an_example_does_not_depend_on_its_batch():
    flow = realnvp((2, 4, 4), blocks=1, width=8, dequantise=False)
    x = torch.rand(8, 2, 4, 4)
    flow.log_prob(x)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    torch.testing.assert_close(flow.log_prob(x)[:2], flow.log_prob(x[:2]))


def test_every_scale_factors_half_out():
    flow = realnvp((1, 8, 8), scales=3, blocks=1, width=4)
    assert flow.latent_shapes == ((2, 4, 4), (4, 2, 2), (4, 2, 2))
    assert flow.encode(torch.rand(2, 1, 8, 8)).shape == (2, 64)


def test_a_checkerboard_of_all_colours_goes_on_to_the_next_scale():
    """As in the published code; with `blocks=0` nothing but the order of the components is left."""
    flow = realnvp((3, 4, 4), blocks=0, width=4, dequantise=False, logit=None).eval()
    x = torch.arange(48.0).view(1, 3, 4, 4)
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    out, kept = flow.encode(x)[0].chunk(2)
    assert set(out.tolist()) == set(x[..., (rows + columns) % 2 == 1].flatten().tolist())
    assert set(kept.tolist()) == set(x[..., (rows + columns) % 2 == 0].flatten().tolist())
    assert torch.equal(flow.decode(flow.encode(x)), x)


def test_reconstruction_after_training_is_accurate():
    flow = realnvp((1, 8, 8), blocks=1, width=8)
    x = torch.rand(32, 1, 1, 1).expand(32, 1, 8, 8).mul(255).floor() / 255  # plain grey
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    bits = []
    for _ in range(40):
        loss = flow.bits_per_dim(flow.log_prob(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bits.append(loss.item())
    assert bits[-1] < bits[0] - 0.5
    assert max(stage.reconstruction_error.item() for stage in flow.stages) < 1e-4
    assert (flow.decode(flow.encode(x)) - x).abs().max() <= 1.01 / 255


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_shape": (32, 32)}, r"image_shape=\(32, 32\): give channels, height and width"),
        ({"image_shape": 32}, "image_shape=32: give channels, height and width"),
        ({"image_shape": (3, 6, 6)}, r"image_shape=\(3, 6, 6\).*can be halved"),
        ({"image_shape": (3, 8, 8), "scales": 0}, "scales=0.*at least one scale"),
        ({"image_shape": (3, 8, 8), "couplings": 0}, "couplings=0.*one coupling"),
        ({"image_shape": (3, 8, 8), "logit": 0.5}, "a=0.5: give how far"),
        ({"image_shape": (3, 8, 8), "width": 0}, "width=0: give at least"),
        ({"image_shape": (3, 8, 8), "prior": "flat"}, "prior='flat': give one of"),
    ],
)
def test_a_mistake_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        realnvp(**arguments)
