"""Layers that scale every component or channel: diagonal scaling and ActNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from revnet.flows.bijection import Bijection
from revnet.reversible import is_recomputing

__all__ = ["ActNorm", "Scaling"]


class Scaling(Bijection):
    """y = x * exp(s), component by component; log-determinant sum(s).

    Source: Dinh, Krueger, Bengio 2014 (NICE), section 3.3.

    Args:
        shape: of an example.

    Example:
        >>> import torch
        >>> from revnet.flows import Scaling
        >>> Scaling((6,)).forward_and_log_det(torch.randn(2, 6))[1]
        tensor([0., 0.], grad_fn=<ExpandBackward0>)
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(shape))

    def forward_and_log_det(self, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Output and log-determinant of shape (B,)."""
        return x * self.log_scale.exp(), self.log_scale.sum().expand(x.shape[0])

    def inverse_and_log_det(self, y: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Input and the negative log-determinant."""
        return y * (-self.log_scale).exp(), -self.log_scale.sum().expand(y.shape[0])


class ActNorm(Bijection):
    """y = (x + b) * exp(s) for every channel; log-determinant sum(s) times the number of positions.

    The first batch that goes forward through it in training mode sets b and s so that every channel of that batch comes
    out with mean 0 and variance 1; from then on they are ordinary parameters. (Over the batches of all processes where
    torch.distributed runs.) Until then, and under `inverse`, it does with them what it would later: nothing at first.

    Source: Kingma, Dhariwal 2018 (Glow), section 3.1.

    Args:
        channels: size of dimension 1.

    Attributes:
        initialised: whether b and s have been set, a buffer, so that a checkpoint says so too.

    Example:
        >>> import torch
        >>> from revnet.flows import ActNorm
        >>> y = ActNorm(3)(5 + 2 * torch.randn(64, 3, 4, 4))
        >>> bool(y.mean().abs() < 1e-4), bool((y.std() - 1).abs() < 1e-2)
        (True, True)
    """

    initialised: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialised", torch.tensor(False))
        self._seen = False  # the buffer was True when last read: asking it again would wait for the device

    def forward_and_log_det(self, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Output and log-determinant of shape (B,)."""
        # A second evaluation in the backward pass has the buffers of the first, and is none to initialise.
        if self.training and not self._seen and not is_recomputing():
            if not self.initialised:
                self._initialise(x)
            self._seen = True
        shift, log_scale = (p.view(-1, *[1] * (x.ndim - 2)) for p in (self.shift, self.log_scale))
        return (x + shift) * log_scale.exp(), self._log_det(x)

    def inverse_and_log_det(self, y: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Input and the negative log-determinant."""
        shift, log_scale = (p.view(-1, *[1] * (y.ndim - 2)) for p in (self.shift, self.log_scale))
        return y * (-log_scale).exp() - shift, -self._log_det(y)

    def _log_det(self, x: Tensor) -> Tensor:
        return (self.log_scale.sum() * x[0, 0].numel()).expand(x.shape[0])

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        values = x.transpose(0, 1).flatten(1)
        mean = _mean_over_processes(values.mean(1))
        deviation = _mean_over_processes((values - mean[:, None]).square().mean(1)).sqrt()
        deviation = torch.where(deviation > 1e-6, deviation, 1.0)  # a constant channel has no scale to learn from
        self.shift.copy_(-mean)
        self.log_scale.copy_(-deviation.log())
        self.initialised.fill_(True)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._seen = False

    def extra_repr(self) -> str:
        return f"{self.shift.numel()}"


def _mean_over_processes(x: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
        x /= torch.distributed.get_world_size()
    return x
