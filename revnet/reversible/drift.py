"""How far a reconstructed state has drifted from the true one, measured on a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from revnet.reversible.grid import checksum
from revnet.reversible.layer import State

__all__ = ["Sample"]

SMALL = 1e-3  # root mean square below which a state is next to nothing


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


def _root_mean_squares(parts: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    sizes = [max(1, part.numel()) ** 0.5 for part in parts]
    return torch.stack(torch._foreach_div(torch._foreach_norm(parts), sizes))


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
        both halves together, one of which may be zero, and to a root mean square of 1e-3 at least. Nothing waits for
        the device. With a checksum: 0 if every bit is equal, and more than 0 if not, wherever the difference lies.
        """
        errors = _root_mean_squares(torch._foreach_sub(_parts(state), self.parts))
        scales = _root_mean_squares(self.parts)
        if len({x.ndim for x in state}) == 1:  # then the halves have the same parts, in the same order
            scales = scales.view(len(state), -1).norm(dim=0).repeat(len(state))
        worst = (errors / scales.clamp_min(SMALL)).amax()
        if self.checksum is None:
            return worst
        different = (checksum(state) != self.checksum).any()
        return torch.where(different, worst.clamp_min(torch.finfo(worst.dtype).eps), worst)
