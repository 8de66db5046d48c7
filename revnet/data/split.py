"""Fixed splits."""

from __future__ import annotations

import numpy as np
from torch import Tensor

__all__ = ["stratified_split"]


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split the indices of `labels` in two, with the same share of every class.

    The split depends on the arguments alone: numpy promises that the numbers of `RandomState` never change.

    Args:
        labels: class of every item, (items,), from 0.
        fraction: share of every class that goes into the second part, rounded to whole items; at least one item of
            each class goes there, unless it is the only one of its class.
        seed: of the choice.

    Returns:
        The indices of the first and the second part, each in ascending order.

    Example:
        >>> import torch
        >>> from revnet.data import stratified_split
        >>> stratified_split(torch.tensor([0, 0, 1, 1]), fraction=0.5, seed=0)
        ([0, 3], [1, 2])
    """
    classes = labels.numpy()
    shuffled = np.random.RandomState(seed).permutation(len(classes))
    grouped = shuffled[np.argsort(classes[shuffled], kind="stable")]  # by class, shuffled within
    sizes = np.bincount(classes)
    place_in_class = np.arange(len(classes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    quota = np.minimum(np.maximum(np.round(fraction * sizes), 1), sizes - 1)
    second = place_in_class < np.repeat(quota, sizes)
    return np.sort(grouped[~second]).tolist(), np.sort(grouped[second]).tolist()
