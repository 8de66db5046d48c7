"""How far a reconstructed state has drifted from the true one, measured on a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from revnet.reversible.grid import checksum
from revnet.reversible.layer import State

__all__ = ["Sample"]


def _sparse(x: Tensor, whole: int) -> Tensor:
    """A view of `x` that has every index of dimension `whole` and two of each other (eight of a single other)."""
    count = 8 if x.ndim == 2 else 2
    steps = [1 if axis == whole else max(1, size // count) for axis, size in enumerate(x.shape)]
    return x[tuple(slice(step // 2, None, step) for step in steps)]


def _values(state: State) -> Tensor:
    parts = []
    for x in state:
        axes = {1, x.ndim - 1} if x.ndim > 1 else {0}
        parts += [_sparse(x.detach(), axis).flatten() for axis in sorted(axes)] if x.ndim else [x.detach().view(1)]
    flat = torch.cat(parts)
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


class Sample:
    """A few values of a state that cover every channel, be the channels dimension 1 or the last.

    Args:
        state: the true state.
        exact: also keep a checksum of all its bits, which finds any difference anywhere.
    """

    def __init__(self, state: State, exact: bool) -> None:
        self.values = _values(state)
        self.checksum = checksum(state) if exact else None

    def error(self, state: State) -> Tensor:
        """||state - true|| / ||true|| over the sampled values, a 0-dim tensor on the device (no synchronisation).

        With a checksum: 0 if every bit is equal, and more than 0 if not, wherever the difference lies.
        """
        error = torch.linalg.vector_norm(_values(state) - self.values)
        # A state of zeros that is reconstructed as zeros has no error; 0 / 0 would say nan.
        relative = torch.where(error == 0, error, error / torch.linalg.vector_norm(self.values))
        if self.checksum is None:
            return relative
        different = (checksum(state) != self.checksum).any()
        return torch.where(different, relative.clamp_min(torch.finfo(relative.dtype).eps), 0.0)
