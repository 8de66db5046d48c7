"""Real images that need no download."""

from __future__ import annotations

from typing import Any

import torch

from revnet.data.datasets import TensorImages
from revnet.data.module import ImageDataModule
from revnet.data.split import stratified_split

__all__ = ["Digits"]


class Digits(ImageDataModule):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; a fixed fifth is the test.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, 1998 (the test part of that collection).

    Args:
        channels: 3, the grey repeated, as networks for coloured images take it; or 1.
        padding: see `ImageDataModule`.
        flip: likewise; digits are not the same when mirrored.
        options: the other arguments of `ImageDataModule`.

    Example:
        >>> from revnet.data import Digits
        >>> data = Digits()
        >>> data.setup()
        >>> {name: len(data.splits[name]) for name in ('train', 'val', 'test')}
        {'train': 1295, 'val': 143, 'test': 359}
    """

    def __init__(self, *, channels: int = 3, padding: int = 1, flip: bool = False, **options: Any) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels={channels}: give 1, or 3 for the grey repeated")
        super().__init__((channels, 8, 8), 10, padding=padding, flip=flip, **options)

    def load(self) -> tuple[TensorImages, None, TensorImages]:
        """Read the digits that scikit-learn contains."""
        from sklearn.datasets import load_digits  # scikit-learn takes a second to import

        digits = load_digits()
        grey = torch.from_numpy(digits.images * (255 / 16)).round().byte()
        images = grey[:, None].repeat(1, self.image_shape[0], 1, 1)
        labels = torch.from_numpy(digits.target).long()
        train, test = stratified_split(labels, fraction=0.2, seed=0)
        return TensorImages(images[train], labels[train]), None, TensorImages(images[test], labels[test])
