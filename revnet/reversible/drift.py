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


def _parts(state: State) -> list[Tensor]:
    """For each tensor a part that covers every example, one that covers dimension 1 and one that covers the last."""
    parts = []
    for x in state:
        axes = sorted({0, 1, x.ndim - 1}) if x.ndim > 1 else [0]
        parts += [_sparse(x.detach(), axis) for axis in axes] if x.ndim else [x.detach()]
    return [part.to(torch.promote_types(part.dtype, torch.float32), copy=True) for part in parts]


class Sample:
    """A few values of a state that cover every example and every channel, be that dimension 1 or the last.

    Args:
        state: the true state.
        exact: also keep a checksum of all its bits, which finds any difference anywhere.
    """

    def __init__(self, state: State, exact: bool) -> None:
        self.parts = _parts(state)
        self.checksum = checksum(state) if exact else None

    def error(self, state: State) -> Tensor:
        """||state - true|| / ||true|| in the worst of the sample's parts, a 0-dim tensor on the device.

        In the worst, so that one example or one channel that is lost does not vanish among the others; but relative to
        both halves, one of which may be zero. Nothing waits for the device. With a checksum: 0 if every bit is equal,
        and more than 0 if not, wherever the difference lies.
        """
        errors = torch.stack(torch._foreach_norm(torch._foreach_sub(_parts(state), self.parts)))
        scales = torch.stack(torch._foreach_norm(self.parts))
        if len({x.ndim for x in state}) == 1:  # then the halves have the same parts, in the same order
            scales = scales.view(len(state), -1).norm(dim=0).repeat(len(state))
        # A state of zeros that is reconstructed as zeros has no error; 0 / 0 would say nan.
        worst = torch.where(errors == 0, errors, errors / scales).amax()
        if self.checksum is None:
            return worst
        different = (checksum(state) != self.checksum).any()
        return torch.where(different, worst.clamp_min(torch.finfo(worst.dtype).eps), worst)
