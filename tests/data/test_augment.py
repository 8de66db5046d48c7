import pytest
import torch
import torch.nn.functional as F

from revnet.data import cutout, mixing, random_crop, random_flip


def distinct_pixels(count: int, size: int) -> torch.Tensor:
    return torch.arange(1.0, count * size * size + 1).view(count, 1, size, size).repeat(1, 3, 1, 1)


def test_every_crop_is_a_window_of_its_own_padded_image():
    images = distinct_pixels(64, 6)
    padded = F.pad(images, [2] * 4)
    offsets = set()
    for image, crop in zip(padded, random_crop(images, padding=2), strict=True):
        fitting = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if torch.equal(image[:, top : top + 6, left : left + 6], crop)
        ]
        assert len(fitting) == 1
        offsets.update(fitting)
    assert len(offsets) > 15  # of 25: images move independently, in both directions
    assert {top for top, _ in offsets} == {left for _, left in offsets} == set(range(5))


def test_crop_works_on_bytes_and_on_images_smaller_than_the_padding():
    images = torch.full((500, 3, 1, 1), 7, dtype=torch.uint8)
    crops = random_crop(images, padding=3)
    assert crops.dtype == torch.uint8
    assert crops.unique().tolist() == [0, 7]


def test_flip_mirrors_about_half_of_the_images():
    images = distinct_pixels(400, 3)
    flipped = random_flip(images)
    same = (flipped == images).all(dim=(1, 2, 3))
    mirrored = (flipped == images.flip(-1)).all(dim=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 150 < same.sum() < 250


def test_cutout_erases_one_square_that_may_reach_over_the_edge():
    images = torch.ones(300, 3, 8, 8)
    holes = cutout(images, size=4) == 0
    assert (holes == holes[:, :1]).all()  # the same place in every channel
    heights = holes[:, 0].any(dim=2).sum(dim=1)
    widths = holes[:, 0].any(dim=1).sum(dim=1)
    assert torch.equal(holes[:, 0].sum(dim=(1, 2)), heights * widths)
    assert heights.unique().tolist() == widths.unique().tolist() == [2, 3, 4]


@pytest.mark.parametrize("change", [lambda x: random_crop(x, 2), random_flip, lambda x: cutout(x, 3)])
def test_the_global_seed_repeats_the_change_and_the_images_stay_untouched(change):
    images = distinct_pixels(20, 8)
    before = images.clone()
    torch.manual_seed(1)
    first = change(images)
    second = change(images)
    torch.manual_seed(1)
    assert torch.equal(change(images), first)
    assert not torch.equal(second, first)
    assert torch.equal(images, before)


def test_images_and_labels_are_mixed_in_the_same_proportion():
    labels = torch.arange(4)
    images = labels.float().view(4, 1, 1, 1).expand(4, 3, 16, 16)  # every pixel is the label
    ways = set()
    for _ in range(20):
        mixed, shares = mixing(0.2, 1.0, num_classes=4)(images, labels)
        assert mixed.shape == images.shape
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), shares @ labels.float())
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(4))
        ways.add("cutmix" if mixed.frac().abs().max() == 0 else "mixup")
    assert ways == {"mixup", "cutmix"}


def test_there_is_something_to_mix_or_not():
    assert mixing(0, 0, num_classes=3) is None
    pasted, _ = mixing(0, 1.0, num_classes=4)(distinct_pixels(4, 8), torch.arange(4))
    assert pasted.frac().abs().max() == 0
    added, _ = mixing(1.0, 0, num_classes=4)(distinct_pixels(4, 8), torch.arange(4))
    assert added.frac().abs().max() > 0
