"""Random changes of a batch of training images, on the device that holds it, without waiting for that device.

Random numbers come from torch's global generator of the device: `torch.manual_seed` repeats them. Images are
normalised first, so the zeros that fill in are the mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["random_crop", "random_flip", "cutout"]


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Shift every image by its own random offset, at most `padding` pixels each way, filling in zeros.

    Args:
        images: (batch, channels, height, width), of any dtype.
        padding: pixels of zeros on each side, out of which a window of the images' own size is cut.

    Example:
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
