import torch

from revnet.flows import InvertibleConvolution


def test_it_is_the_1x1_convolution_by_its_weight():
    layer, x = InvertibleConvolution(6), torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(layer(x), torch.nn.functional.conv2d(x, layer.weight()[..., None, None]))


def test_it_begins_as_a_rotation():
    layer = InvertibleConvolution(6).double()
    weight = layer.weight()
    torch.testing.assert_close(weight @ weight.T, torch.eye(6, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        layer.forward_and_log_det(torch.randn(2, 6).double())[1].detach(), torch.zeros(2).double(), atol=1e-5, rtol=0
    )


def test_an_ill_conditioned_weight_is_inverted_in_float64():
    layer, x = InvertibleConvolution(8), torch.randn(4, 8, 4, 4)
    with torch.no_grad():
        layer.log_scale[0] = -6.0
    truth = torch.linalg.inv(layer.weight().double())
    found = layer.inverse(torch.eye(8))  # the rows are examples
    torch.testing.assert_close(found.T.double(), truth, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(layer.inverse(layer(x)), x, rtol=0, atol=2e-3)


def test_autocast_leaves_it_in_full_precision():
    layer, x = InvertibleConvolution(8), torch.randn(4, 8, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer.inverse(layer(x)), x)


def test_it_needs_no_data():
    layer, x = InvertibleConvolution(8).to("meta"), torch.empty(2, 8, 4, 4, device="meta")
    assert layer(x).shape == layer.inverse(x).shape == x.shape
