import pytest
import torch

from revnet.flows import Dequantise, Logit, bits_per_dim


def test_dequantise_is_the_formula_and_gives_back_every_level():
    x = torch.arange(256).repeat(2000) / 255
    y = Dequantise()(x[None])[0]
    noise = 256 * y.double() - (255 * x).round()
    assert 0 < noise.min() < 0.001
    assert 0.99 < noise.max() < 1
    assert abs(noise.mean() - 0.5) < 0.003
    assert (noise > noise.max() - 1e-4).double().mean() < 1e-3  # a density: no value has a share of its own
    assert torch.equal(Dequantise().inverse(y[None])[0], x)


def test_the_gradient_passes_through_the_floor():
    y = torch.rand(2, 3, requires_grad=True)
    Dequantise().inverse(y).sum().backward()
    torch.testing.assert_close(y.grad, torch.full_like(y, 256 / 255))


def test_values_beyond_the_levels_are_clamped():
    assert torch.equal(Dequantise().inverse(torch.tensor([[-0.1, 1.0, 1.1]])), torch.tensor([[0.0, 1.0, 1.0]]))


@pytest.mark.parametrize("layer", [Dequantise(), Logit()], ids=["dequantise", "logit"])
@pytest.mark.parametrize("value", [-0.06, 1.06, 255.0, float("nan")])
def test_values_outside_the_unit_interval(layer, value):
    x = torch.rand(2, 3)
    x[1, 2] = value
    with pytest.raises(ValueError, match=rf"{type(layer).__name__} takes values in \[0, 1\].*divide"):
        layer(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_noise_needs_room_between_the_levels(dtype):
    with pytest.raises(ValueError, match="no room for noise between the 256 levels; give the images in float32"):
        Dequantise()(torch.rand(2, 3).to(dtype))


def test_logit_is_the_formula():
    x = torch.rand(2, 3, dtype=torch.float64)
    torch.testing.assert_close(Logit()(x), torch.logit(0.05 + 0.9 * x))
    assert Logit()(torch.tensor([[0.0, 1.0]])).abs().max() < 3


def test_logit_takes_what_its_inverse_gives_and_no_more():
    layer, y = Logit(), torch.tensor([[-9.0, 9.0]], dtype=torch.float64)
    torch.testing.assert_close(layer(layer.inverse(y)), y)
    with pytest.raises(ValueError, match=r"Logit takes values in \[0, 1\], got values from -0\.0"):
        layer(torch.tensor([[-0.06, 0.5]]))


def test_the_inverse_of_the_logit_is_finite_far_out():
    x, log_det = Logit().inverse_and_log_det(torch.tensor([[-500.0, 500.0]]))
    assert x.isfinite().all()
    assert log_det.isfinite().all()


@pytest.mark.parametrize("a", [0, 0.5, -1])
def test_logit_keeps_off_by_less_than_a_half(a):
    with pytest.raises(ValueError, match="above 0 and below"):
        Logit(a)


def test_bits_per_dim_of_a_density_that_knows_the_levels_is_their_entropy():
    probabilities = torch.softmax(torch.randn(256, dtype=torch.float64), 0)
    levels = torch.multinomial(probabilities, 100_000, replacement=True)
    y = Dequantise()(levels[:, None].double() / 255)
    density = 256 * probabilities[(256 * y).long()]  # constant over each level's width of 1/256
    entropy = -(probabilities * probabilities.log2()).sum()
    assert abs(bits_per_dim(density.log(), 1).mean() - entropy) < 0.02
