import pytest
import torch

from revnet.data import Fake


def test_images_have_the_shape_and_the_seed_that_was_asked_for():
    held = []
    for seed in (0, 0, 1):
        data = Fake(image_shape=[2, 5, 7], num_classes=3, train_size=30, test_size=10, seed=seed, val_fraction=0.2)
        assert (data.num_classes, data.image_shape) == (3, (2, 5, 7))
        data.setup()
        held.append(data.splits["test"].images)
    assert held[0].shape == (10, 2, 5, 7)
    assert torch.equal(held[0], held[1])
    assert not torch.equal(held[0], held[2])
    assert [len(data.splits[name]) for name in ("train", "val", "test")] == [24, 6, 10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_shape": (32, 32)}, r"image_shape=\(32, 32\): give \(channels, height, width\)"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"train_size": 9}, "train_size=9, test_size=128: give at least one image for each of num_classes=10"),
    ],
)
def test_an_odd_argument_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Fake(**options)
