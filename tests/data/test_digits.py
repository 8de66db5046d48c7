import pytest
import torch

from revnet.data import Digits


def test_digits_are_all_there_and_distinct_between_the_splits():
    data = Digits()
    assert (data.num_classes, data.image_shape) == (10, (3, 8, 8))
    data.setup()
    test = data.splits["test"]
    images = data.splits["train"].dataset
    assert len(images) + len(test) == 1797
    assert [len(data.splits[name]) for name in ("train", "val", "test")] == [1295, 143, 359]
    assert images.images.dtype == torch.uint8
    assert images.images.unique().tolist() == [round(step * 255 / 16) for step in range(17)]
    assert (images.images[:, 0] == images.images[:, 2]).all()
    assert ((test.labels.bincount() - 36).abs() <= 1).all()
    labels = images.labels[data.splits["val"].indices]
    assert ((labels.bincount() - 14).abs() <= 1).all()


def test_one_channel_is_enough_for_flows():
    data = Digits(channels=1, normalization="unit")
    data.setup()
    assert data.image_shape == (1, 8, 8)
    images = data.preprocess(data.splits["test"].images, training=False)
    assert images.shape == (359, 1, 8, 8)
    assert (images.min(), images.max()) == (0, 1)
    with pytest.raises(ValueError, match="channels=2: give 1, or 3"):
        Digits(channels=2)
