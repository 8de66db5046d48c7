"""Bytes to the numbers that a network is fed with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["Normalize"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """`(images - shift) / scale`, in single precision; images of bytes, (batch, channels, height, width).

    Args:
        shift: broadcasts to one image.
        scale: likewise.

    Example:
        >>> import torch
        >>> from revnet.data import Normalize
        >>> Normalize.named("symmetric")(torch.tensor([0, 255], dtype=torch.uint8))
        tensor([-1.,  1.])
    """

    shift: Tensor
    scale: Tensor

    NAMES = ("mean_std", "mean_image", "symmetric", "imagenet", "unit")

    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift.float())
        self.register_buffer("scale", scale.float())

    def forward(self, images: Tensor) -> Tensor:
        """Normalise a batch of bytes."""
        return torch.sub(images, self.shift).div_(self.scale)

    @classmethod
    def named(cls, name: str, batches: Iterable[Tensor] = ()) -> Normalize:
        """The normalisation called `name`.

        Args:
            name: "mean_std" (zero mean and unit variance per channel), "mean_image" (minus the mean training image,
                pixels keep their range: the paper's CIFAR), "symmetric" (to [-1, 1]: the paper's ImageNet),
                "imagenet" (as torchvision's weights expect it) or "unit" (to [0, 1]: for flows).
            batches: the training images, for the first two.

        Raises:
            ValueError: it has another name.
        """
        if name not in cls.NAMES:
            raise ValueError(f"normalization={name!r}: valid are {', '.join(cls.NAMES)}")
        if name == "symmetric":
            return cls(torch.tensor(127.5), torch.tensor(127.5))
        if name == "unit":
            return cls(torch.tensor(0.0), torch.tensor(255.0))
        if name == "imagenet":
            mean, std = (torch.tensor(value).view(3, 1, 1) * 255 for value in (IMAGENET_MEAN, IMAGENET_STD))
            return cls(mean, std)
        mean, square = _moments(batches)
        if name == "mean_image":
            return cls(mean, torch.tensor(1.0))
        mean, square = (moment.mean(dim=(1, 2), keepdim=True) for moment in (mean, square))
        # A channel that is constant has no scale of its own: one step of the byte.
        return cls(mean, (square - mean.square()).clamp(min=1).sqrt())


def _moments(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and mean square of every pixel, in double precision."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        values = batch.double()
        count += len(values)
        total = total + values.sum(dim=0)
        squares = squares + values.square().sum(dim=0)
    return total / count, squares / count
