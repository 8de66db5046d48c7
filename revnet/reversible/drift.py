"""How far a reconstructed state has drifted from the true one, measured on a sample."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["relative_error", "sample"]


def _sparse(x: Tensor, whole: int) -> Tensor:
    """A view of `x` that has every index of dimension `whole` and two of each other (eight of a single other)."""
    count = 8 if x.ndim == 2 else 2
    steps = [1 if axis == whole else max(1, size // count) for axis, size in enumerate(x.shape)]
    return x[tuple(slice(step // 2, None, step) for step in steps)]


def sample(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A small copy of the state that covers every channel, be the channels dimension 1 or the last."""
    parts = []
    for x in state:
        axes = {1, x.ndim - 1} if x.ndim > 1 else {0}
        parts += [_sparse(x.detach(), axis).flatten() for axis in sorted(axes)] if x.ndim else [x.detach().view(1)]
    return tuple(part.clone() for part in parts)


def _flat(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([x.to(torch.promote_types(x.dtype, torch.float32)) for x in parts])


def relative_error(state: tuple[Tensor, ...], kept: tuple[Tensor, ...]) -> Tensor:
    """||state - kept|| / ||kept|| over the sampled positions, a 0-dim tensor on the device (no synchronisation)."""
    truth = _flat(kept)
    error = torch.linalg.vector_norm(_flat(sample(state)) - truth)
    # A state of zeros that is reconstructed as zeros has no error; 0 / 0 would say nan.
    return torch.where(error == 0, error, error / torch.linalg.vector_norm(truth))
