"""Images with labels, in memory or in files; both hand out whole batches of bytes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from pytorch_lightning.utilities import rank_zero_only
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from revnet.data.read_image import read_image

__all__ = ["TensorImages", "FileImages", "ReadableImages", "whole_batch"]

Batch = tuple[Tensor, Tensor]


def whole_batch(batch: Any) -> Any:
    """Leave a batch as it is: the `collate_fn` for these data sets."""
    return batch


@contextmanager
def repeatable(*place: Any) -> Iterator[None]:
    """Let torch's random numbers on the CPU depend on `place` alone: not on the process, nor on what went before."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(random.Random(repr(place)).getrandbits(63))  # torch's own would seed GPUs, too
    try:
        yield
    finally:
        torch.set_rng_state(state)


class TensorImages(Dataset[Batch]):
    """Images held as one tensor of bytes: a batch of them costs one indexing operation.

    Args:
        images: (items, channels, height, width), uint8.
        labels: (items,), int64.

    Example:
        >>> import torch
        >>> from revnet.data import TensorImages
        >>> from revnet.data.datasets import whole_batch
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

    Attributes:
        unreadable: (items,), bool; marks the files that `ReadableImages` has found to be no images. All processes of a
            data loader share it.
    """

    def __init__(self, paths: Sequence[str], labels: Tensor, transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths = paths
        self.labels = labels
        self.transform = transform
        self.unreadable = torch.zeros(len(paths), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Batch:
        return self.transform(read_image(self.paths[index])), self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        images = [self.transform(read_image(self.paths[index])) for index in indices]
        return torch.stack(images), self.labels[indices]

    def unreadable_paths(self) -> list[str]:
        """The paths of the files that are marked as unreadable."""
        return [self.paths[index] for index in self.unreadable.nonzero().flatten().tolist()]

    def decode(self, image_shape: tuple[int, int, int], num_workers: int, skip_unreadable: bool) -> TensorImages:
        """Read all files into memory, and show the progress where there are many.

        Args:
            image_shape: (channels, height, width) of what `transform` returns.
            num_workers: processes to share the work.
            skip_unreadable: leave out files that are no images; else the first one raises a ValueError.
        """
        batch = 128
        source = ReadableImages(self, range(len(self))) if skip_unreadable else self
        loader = DataLoader(source, batch, num_workers=min(num_workers, len(self) // batch), collate_fn=whole_batch)
        images = torch.empty(len(self), *image_shape, dtype=torch.uint8)
        hidden = len(self) < 5000 or getattr(rank_zero_only, "rank", 0) > 0
        shown = track(loader, f"Reading {len(self):,} images", transient=True, disable=hidden)
        for place, (decoded, _) in zip(images.split(batch), shown, strict=True):
            place.copy_(decoded)
        if self.unreadable.any():
            return TensorImages(images[~self.unreadable], self.labels[~self.unreadable])
        return TensorImages(images, self.labels)


class ReadableImages(Subset[Batch]):
    """A part of `FileImages` in which the next readable file stands in for one that cannot be read.

    So batches keep their size, and every process of a distributed training has as many of them as the others.

    Args:
        images: the whole.
        indices: of the part; what stands in is of it, too.

    Raises:
        ValueError: when images are asked for and none of the part can be read.
    """

    def __init__(self, images: FileImages, indices: Sequence[int]) -> None:
        super().__init__(images, indices)
        self.images = images

    def __getitem__(self, place: int) -> Batch:
        for step in range(len(self)):
            index = self.indices[(place + step) % len(self)]
            if not self.images.unreadable[index]:
                try:
                    image = read_image(self.images.paths[index])
                except (ValueError, FileNotFoundError, PermissionError):  # not a fault of the disk
                    self.images.unreadable[index] = True
                else:
                    return self.images.transform(image), self.images.labels[index]
        raise ValueError(
            f"none of {len(self)} images can be read, {self.images.paths[self.indices[place]]} among them; "
            f"check data.root"
        )

    def __getitems__(self, places: Sequence[int]) -> Batch:  # type: ignore[override]
        images, labels = zip(*[self[place] for place in places], strict=True)
        return torch.stack(images), torch.stack(labels)
