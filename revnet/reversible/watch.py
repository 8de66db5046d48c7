"""Judges the reconstruction error of every backward pass: silence, a warning or an error."""

from __future__ import annotations

import math
import warnings
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["ReconstructionError", "ReconstructionWarning", "Watch", "remedy"]


def remedy(exact: bool) -> str:
    """What helps against drift, with a fixed-point grid and without."""
    if exact:
        return (
            "it went beyond the range of the fixed-point grid of exact mode (256 in fp32), or a branch is not "
            "deterministic; normalised branches keep it within; exact=False reconstructs in floating point"
        )
    return (
        'exact=True keeps additive couplings free of it; activations="recompute" or "store" does not reconstruct; full '
        "precision, normalised branches and fewer layers in one stretch reduce it"
    )


class ReconstructionWarning(UserWarning):
    """Reconstructed activations have drifted from the true ones: gradients begin to be inaccurate."""


class ReconstructionError(RuntimeError):
    """Reconstructed activations are so far from the true ones, or not finite, that the gradients are worthless."""


@dataclass(slots=True)
class Watch:
    """Compares the errors of one sequence with thresholds, without making the program wait for the device.

    On a CPU an error is judged within the backward pass that it belongs to, so that a step with worthless gradients is
    never applied. On an accelerator it is copied in the background and judged as soon as it has arrived, at the latest
    within the next forward pass but one: waiting for it would cost more than the reconstruction. A step that is
    replayed as a CUDA graph is not judged; every replay writes the sequence's `reconstruction_error`, to be looked at.

    Attributes:
        warn_above: relative error above which to warn; None: 1e-3, under autocast 5e-2, in exact mode 0.
        raise_above: relative error above which to raise, as for one that is not finite; None: 1e-1. `math.inf` never
            raises.
    """

    warn_above: float | None = None
    raise_above: float | None = None
    _pending: deque[tuple[int, Tensor, torch.Event, float, bool]] = field(default_factory=deque)
    _passes: int = 0

    def __reduce__(self) -> tuple[type[Watch], tuple[float | None, float | None]]:
        """Copies keep the thresholds; what is on its way from the device stays with the original."""
        return Watch, (self.warn_above, self.raise_above)

    def tolerance(self, autocast: bool, exact: bool) -> float:
        """The error above which to warn."""
        if self.warn_above is not None:
            return self.warn_above
        return 0.0 if exact else 5e-2 if autocast else 1e-3

    def see(self, error: Tensor, autocast: bool, exact: bool) -> None:
        """Takes the error of one backward pass."""
        warn_above = self.tolerance(autocast, exact)
        if error.device.type == "meta" or isinstance(error, FakeTensor):
            return  # nothing was computed
        if _is_capturing():
            return  # it has no value yet, but a new one with every replay
        if error.device.type == "cpu":
            self._judge(float(error), warn_above, exact)
            return
        on_host = torch.empty_like(error, device="cpu", pin_memory=True).copy_(error, non_blocking=True)
        arrived = torch.Event(error.device.type)
        arrived.record()
        self._pending.append((self._passes, on_host, arrived, warn_above, exact))

    def judge_arrived(self) -> None:
        """Judges the errors that have arrived from the device; for the beginning of every forward pass.

        Those of the pass before the last one are waited for: the device has long gone on.
        """
        if _is_capturing():
            return  # nothing may be asked of the device
        self._passes += 1
        while self._pending and (self._pending[0][0] < self._passes - 1 or self._pending[0][2].query()):
            _, on_host, arrived, warn_above, exact = self._pending.popleft()
            arrived.synchronize()
            self._judge(float(on_host), warn_above, exact)

    def _judge(self, error: float, warn_above: float, exact: bool) -> None:
        raise_above = 1e-1 if self.raise_above is None else self.raise_above
        if error > raise_above or (not math.isfinite(error) and raise_above < math.inf):
            raise ReconstructionError(
                f"the reconstructed input of a reversible sequence is {error:.1e} off the true one (relative), beyond "
                f"the threshold of {raise_above:.1e}: its gradients are worthless. {remedy(exact)}"
            )
        if not error <= warn_above:
            warnings.warn(
                f"the reconstructed input of a reversible sequence is {error:.1e} off the true one (relative), beyond "
                f"the threshold of {warn_above:.1e}: its gradients are inaccurate. {remedy(exact)}",
                ReconstructionWarning,
                stacklevel=2,
            )


def _is_capturing() -> bool:
    """Whether a CUDA graph is being captured; torch cannot be asked where there is no driver."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
