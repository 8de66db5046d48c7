import pytest
import torch

from revnet.data import Normalize


@pytest.fixture
def images():
    images = torch.randint(256, (90, 3, 4, 5), dtype=torch.uint8)
    images[:, 1] //= 3
    return images


def test_mean_std_gives_zero_mean_and_unit_variance_per_channel(images):
    output = Normalize.named("mean_std", images.split(40))(images)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.std(dim=(0, 2, 3), correction=0), torch.ones(3))


def test_mean_image_is_subtracted_and_pixels_keep_their_range(images):
    output = Normalize.named("mean_image", images.split(40))(images)
    torch.testing.assert_close(output, images.float() - images.float().mean(dim=0))
    assert output.max() > 100


def test_symmetric_reaches_from_minus_one_to_one():
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    assert Normalize.named("symmetric")(ends).flatten().tolist() == [-1, 1]


def test_unit_is_what_flows_take():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    output = Normalize.named("unit")(levels)
    assert torch.equal(output, levels / 255)


def test_imagenet_is_what_the_weights_of_torchvision_expect(images):
    from torchvision.models import ResNet18_Weights

    transform = ResNet18_Weights.DEFAULT.transforms()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (transform.mean, transform.std))
    torch.testing.assert_close(Normalize.named("imagenet")(images), (images / 255 - mean) / std)


def test_a_constant_channel_becomes_zero():
    images = torch.full((5, 3, 2, 2), 200, dtype=torch.uint8)
    assert Normalize.named("mean_std", [images])(images).abs().max() == 0


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="normalization='mean-std': valid are mean_std, "):
        Normalize.named("mean-std", [])
