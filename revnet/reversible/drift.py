"""How far a reconstructed state has drifted from the true one, measured on a sample."""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import torch
from torch import Tensor

__all__ = ["relative_error", "sample"]

_LEAST, _MOST = 256, 4096


@lru_cache(maxsize=256)
def _positions(shape: torch.Size, device: torch.device) -> tuple[Tensor, ...]:
    """Indices of a few hundred elements among which every index of every dimension occurs (up to 4096 per dimension).

    Each dimension is walked with a stride coprime to its size, so that whichever dimension holds the channels, every
    channel is seen.
    """
    count = min(max(_LEAST, *shape), _MOST)
    steps = torch.arange(count)
    indices = []
    for axis, size in enumerate(shape):
        stride = next(s for s in range(2 * axis + 1, 2 * axis + 2 + size) if gcd(s, size) == 1)
        indices.append((steps * stride % size).to(device))
    return tuple(indices)


def sample(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A small copy of the state, taken at positions that cover every channel."""
    return tuple(x.detach()[_positions(x.shape, x.device)] if x.ndim and x.numel() else x.detach() for x in state)


def _flat(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([x.flatten().to(torch.promote_types(x.dtype, torch.float32)) for x in parts])


def relative_error(state: tuple[Tensor, ...], kept: tuple[Tensor, ...]) -> Tensor:
    """||state - kept|| / ||kept|| over the sampled positions, a 0-dim tensor on the device (no synchronisation)."""
    truth = _flat(kept)
    error = torch.linalg.vector_norm(_flat(sample(state)) - truth)
    # A state of zeros that is reconstructed as zeros has no error; 0 / 0 would say nan.
    return torch.where(error == 0, error, error / torch.linalg.vector_norm(truth))
