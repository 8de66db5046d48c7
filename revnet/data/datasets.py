"""Images with labels, in memory or in files; both hand out whole batches of bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from pytorch_lightning.utilities import rank_zero_only
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from revnet.data.read_image import read_image

__all__ = ["TensorImages", "FileImages", "whole_batch"]

Batch = tuple[Tensor, Tensor]


def whole_batch(batch: Any) -> Any:
    """Leave a batch as it is: the `collate_fn` for these data sets."""
    return batch


class TensorImages(Dataset[Batch]):
    """Images held as one tensor of bytes: a batch of them costs one indexing operation.

    Args:
        images: (items, channels, height, width), uint8.
        labels: (items,), int64.

    Example:
        >>> images = TensorImages(torch.zeros(10, 3, 8, 8, dtype=torch.uint8), torch.arange(10))
        >>> loader = torch.utils.data.DataLoader(images, batch_size=4, collate_fn=whole_batch)
        >>> [labels.tolist() for _, labels in loader]
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self.images[indices], self.labels[indices]


class FileImages(Dataset[Batch]):
    """Images read from their files whenever they are asked for. For small images, `TensorImages` is far faster.

    Args:
        paths: of the files.
        labels: (items,), int64.
        transform: from an RGB image to a tensor of bytes, (channels, height, width), of the same shape for all.
    """

    def __init__(self, paths: Sequence[str], labels: Tensor, transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths = paths
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Batch:
        return self.transform(read_image(self.paths[index])), self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        images = [self.transform(read_image(self.paths[index])) for index in indices]
        return torch.stack(images), self.labels[indices]

    def decode(self, image_shape: tuple[int, int, int], num_workers: int) -> TensorImages:
        """Read all files into memory, and show the progress where there are many.

        Args:
            image_shape: (channels, height, width) of what `transform` returns.
            num_workers: processes to share the work.
        """
        batch = 128
        loader = DataLoader(self, batch, num_workers=min(num_workers, len(self) // batch), collate_fn=whole_batch)
        images = torch.empty(len(self), *image_shape, dtype=torch.uint8)
        hidden = len(self) < 5000 or getattr(rank_zero_only, "rank", 0) > 0
        shown = track(loader, f"Reading {len(self):,} images", transient=True, disable=hidden)
        for place, (decoded, _) in zip(images.split(batch), shown, strict=True):
            place.copy_(decoded)
        return TensorImages(images, self.labels)
