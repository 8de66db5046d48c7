"""Random changes of a batch of training images, on the device that holds it, without waiting for that device.

Random numbers come from torch's global generator of the device: `torch.manual_seed` repeats them. Images are
normalised first, so the zeros that fill in are the mean, where it is subtracted: `symmetric` has a mean gray there,
`unit` black.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

__all__ = ["random_crop", "random_flip", "cutout", "mixing"]


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Shift every image by its own random offset, at most `padding` pixels each way, filling in zeros.

    Args:
        images: (batch, channels, height, width), of any dtype.
        padding: pixels of zeros on each side, out of which a window of the images' own size is cut.

    Example:
        >>> import torch
        >>> from revnet.data import random_crop
        >>> random_crop(torch.ones(8, 3, 32, 32), padding=4).shape
        torch.Size([8, 3, 32, 32])
    """
    count, _, height, width = images.shape
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(2 * padding + 1, (2, count), device=images.device)
    return windows[torch.arange(count, device=images.device), :, top, left]


def random_flip(images: Tensor) -> Tensor:
    """Mirror every image left to right with probability 1/2. Not for digits, text and other oriented things.

    Args:
        images: (batch, channels, height, width), of any dtype.

    Example:
        >>> import torch
        >>> from revnet.data import random_flip
        >>> random_flip(torch.tensor([[[[1, 2]]]])).sum().item()
        3
    """
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(chosen, images.flip(-1), images)


def cutout(images: Tensor, size: int) -> Tensor:
    """Set a square at a random place of every image to zero.

    Source: DeVries and Taylor, Improved Regularization of Convolutional Neural Networks with Cutout, 2017.

    Args:
        images: (batch, channels, height, width), of any dtype.
        size: side of the square in pixels. Its centre lies in the image, its corners may not.

    Example:
        >>> import torch
        >>> from revnet.data import cutout
        >>> (cutout(torch.ones(1, 1, 9, 9), size=1) == 0).sum().item()
        1
    """
    count, _, height, width = images.shape
    device = images.device
    top = torch.randint(height, (count, 1, 1, 1), device=device) - size // 2
    left = torch.randint(width, (count, 1, 1, 1), device=device) - size // 2
    row = torch.arange(height, device=device)[:, None]
    column = torch.arange(width, device=device)
    hole = (top <= row) & (row < top + size) & (left <= column) & (column < left + size)
    return images.masked_fill(hole, 0)


def mixing(mixup: float, cutmix: float, num_classes: int) -> v2.Transform | None:
    """Mix every image of a batch with another one, and their labels alike: `(images, labels) -> (images, shares)`.

    With both, every batch is mixed in one of the two ways, each with probability 1/2. The shares, (batch, classes), are
    what the cross-entropy takes as probabilities.

    Sources: Zhang et al., mixup, 2018; Yun et al., CutMix, 2019.

    Args:
        mixup: parameter of the beta distribution from which the weights of two images that are added are drawn; 0 for
            none.
        cutmix: likewise for the area of the rectangle that is pasted from one into the other; 0 for none.
        num_classes: of the labels.

    Returns:
        None if there is nothing to mix.

    Example:
        >>> import torch
        >>> from revnet.data import mixing
        >>> images, shares = mixing(0.2, 1.0, num_classes=5)(torch.ones(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
        >>> images.shape, shares.shape, round(shares.sum().item(), 4)
        (torch.Size([4, 3, 8, 8]), torch.Size([4, 5]), 4.0)
    """
    ways: list[v2.Transform] = []
    if mixup:
        ways.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix:
        ways.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    return v2.RandomChoice(ways) if ways else None
