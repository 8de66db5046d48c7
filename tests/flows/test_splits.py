import pytest
import torch
from torch import nn

from revnet.flows import CheckerboardBranch, CheckerboardSplit, DiagonalFirst, OddEvenSplit, Split, Squeeze


def test_checkerboard_holds_the_pixels_of_each_colour():
    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    i, j = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    x1, x2 = CheckerboardSplit()(x)
    assert torch.equal(x1.flatten(2), x[:, :, (i + j) % 2 == 0])
    assert torch.equal(x2.flatten(2), x[:, :, (i + j) % 2 == 1])


@pytest.mark.parametrize("swap", [False, True])
def test_the_network_sees_the_full_image_with_zeros_and_gives_the_other_half(swap):
    seen = []

    class Network(nn.Module):
        def forward(self, image):
            seen.append(image)
            return torch.arange(image.numel(), dtype=image.dtype).view_as(image), image

    split, x = CheckerboardSplit(), 1 + torch.rand(1, 2, 4, 4)
    stays = split(x)[0 if swap else 1]
    first, second = CheckerboardBranch(Network(), swap)(stays)
    i, j = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    white = (i + j) % 2 == (0 if swap else 1)
    assert torch.equal(seen[0], torch.where(white, x, 0.0))
    assert torch.equal(first.flatten(2), torch.arange(32.0).view(1, 2, 4, 4)[:, :, ~white])
    assert torch.equal(second, torch.zeros_like(second))


@pytest.mark.parametrize("dim", [1, 2, -1, -2])
def test_odd_and_even_components(dim):
    x = torch.randn(2, 4, 6, 8)
    x1, x2 = OddEvenSplit(dim)(x)
    index = torch.arange(0, x.shape[dim], 2)
    assert torch.equal(x1, x.index_select(dim, index))
    assert torch.equal(x2, x.index_select(dim, index + 1))
    assert torch.equal(OddEvenSplit(dim).inverse(x1, x2), x)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (OddEvenSplit(), (2, 5), "cannot split 5 components.*give an even number"),
        (CheckerboardSplit(), (2, 3, 4, 5), r"\(2, 3, 4, 5\) by a checkerboard.*even width"),
        (CheckerboardSplit(), (2, 6), "by a checkerboard: give images"),
        (DiagonalFirst(), (2, 6, 4, 4), r"shape \(2, 6, 4, 4\) by the pixels of squares: give 4 channels for each"),
        (Split(), (2, 3, 4, 4), "cannot split 3 channels.*give an even number"),
        (Squeeze(), (2, 3, 5, 4), "cannot squeeze images"),
    ],
)
def test_sizes_that_do_not_split(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(shape))
