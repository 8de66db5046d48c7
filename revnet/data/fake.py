"""Synthetic images, for tests and first tries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from revnet.data.datasets import TensorImages
from revnet.data.module import ImageDataModule

__all__ = ["Fake"]


class Fake(ImageDataModule):
    """Noise over one random pattern per class: images without meaning, of any shape, that a network can tell apart.

    Args:
        image_shape: (channels, height, width).
        num_classes: how many patterns there are.
        train_size: images to train and validate on.
        test_size: images to test on.
        seed: of all pixels.
        padding: see `ImageDataModule`; shifted or mirrored, a pattern would be another one.
        flip: likewise.
        options: the other arguments of `ImageDataModule`.

    Example:
        >>> from revnet.data import Fake
        >>> data = Fake((1, 5, 5), num_classes=3, train_size=9, val_fraction=0)
        >>> data.setup()
        >>> images, labels = data.splits["train"][0]
        >>> images.shape, images.dtype
        (torch.Size([1, 5, 5]), torch.uint8)
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (3, 32, 32),
        num_classes: int = 10,
        train_size: int = 512,
        test_size: int = 128,
        seed: int = 0,
        *,
        padding: int = 0,
        flip: bool = False,
        **options: Any,
    ) -> None:
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"image_shape={image_shape}: give (channels, height, width), each at least 1")
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: give at least 1")
        if min(train_size, test_size) < num_classes:
            raise ValueError(
                f"train_size={train_size}, test_size={test_size}: give at least one image for each of "
                f"num_classes={num_classes}"
            )
        channels, height, width = image_shape
        super().__init__((channels, height, width), num_classes, padding=padding, flip=flip, **options)
        self.sizes = (train_size, test_size)
        self.seed = seed

    def load(self) -> tuple[TensorImages, None, TensorImages]:
        """Make the images."""
        random = torch.Generator().manual_seed(self.seed)

        def noise(count: int) -> torch.Tensor:
            return torch.randint(256, (count, *self.image_shape), generator=random, dtype=torch.uint8)

        patterns = noise(self.num_classes) // 2
        train, test = (
            TensorImages(patterns[labels] + noise(len(labels)) // 2, labels)
            for labels in (torch.arange(size) % self.num_classes for size in self.sizes)
        )
        return train, None, test
