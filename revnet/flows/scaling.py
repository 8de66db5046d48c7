"""Layers that scale every component or channel: diagonal scaling and ActNorm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from revnet.flows.bijection import Bijection
from revnet.flows.finite import has_values
from revnet.reversible import is_recomputing

__all__ = ["ActNorm", "Scaling"]


class _FromFirstBatch(Bijection):
    """A layer whose parameters are set by the first finite batch that goes forward through it in training mode.

    Unless they are no longer 0 by then: trained by way of the inverse, on samples.
    """

    initialised: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("initialised", torch.tensor(False))
        self._seen = False  # the buffer was True when last read: asking it again would wait for the device

    @torch.no_grad()
    def _look_at(self, x: Tensor, dims: list[int]) -> None:
        # A second evaluation in the backward pass has the buffers of the first, and is none to initialise.
        if self.training and not self._seen and not is_recomputing():
            learn = type(self)._learn_from
            if torch.compiler.is_compiling():  # asked for here alone, as it loads the compiler
                learn = torch.compiler.disable(learn, reason="the first batch is looked at by eager code")
            learn(self, x, dims)

    def _learn_from(self, x: Tensor, dims: list[int]) -> None:
        if not has_values(x):
            return
        if not self.initialised and any(bool(parameter.any()) for parameter in self.parameters()):
            self.initialised.fill_(True)  # it has learnt from samples, by its inverse, or was set by hand
        elif not self.initialised:
            mean, deviation = _mean_and_deviation(x, dims)
            if not bool(torch.isfinite(mean).all() & torch.isfinite(deviation).all()):
                return  # of a batch that the flow refuses
            self._initialise(mean, deviation)
            self.initialised.fill_(True)
        self._seen = True

    def _initialise(self, mean: Tensor, deviation: Tensor) -> None:
        raise NotImplementedError(f"{type(self).__name__} must define `_initialise`")

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._seen = has_values(self.initialised) and bool(self.initialised)


class Scaling(_FromFirstBatch):
    """y = x * exp(s), component by component; log-determinant sum(s).

    The first batch that goes forward through it in training mode sets s so that every component of that batch comes out
    with variance 1, as in `ActNorm`, unless s has been trained by way of the inverse before: where the data are almost
    constant, as at the border of digits, the likelihood is highest under factors of hundreds, to which steps of 1e-3
    take thousands of batches. A first step with both directions wants such a batch ahead of it, see `ActNorm`.

    Source: Dinh, Krueger, Bengio 2014 (NICE), section 3.3; there without a word on how s begins.

    Args:
        shape: of an example.

    Attributes:
        initialised: whether s has been set, a buffer, so that a checkpoint says so too.

    Example:
        >>> import torch
        >>> from revnet.flows import Scaling
        >>> x = torch.randn(64, 6) * 0.01
        >>> y, log_det = Scaling((6,)).forward_and_log_det(x)
        >>> bool((y.std(0, correction=0) - 1).abs().max() < 1e-4), log_det.shape
        (True, torch.Size([64]))
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(shape))

    def forward_and_log_det(self, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Output and log-determinant of shape (B,)."""
        self._look_at(x, [0])
        return x * self.log_scale.exp(), self.log_scale.sum().expand(x.shape[0])

    def inverse_and_log_det(self, y: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Input and the negative log-determinant."""
        return y * (-self.log_scale).exp(), -self.log_scale.sum().expand(y.shape[0])

    def _initialise(self, mean: Tensor, deviation: Tensor) -> None:
        self.log_scale.copy_(-deviation.log().reshape(self.log_scale.shape))


class ActNorm(_FromFirstBatch):
    """y = (x + b) * exp(s) for every channel; log-determinant sum(s) times the number of positions.

    The first batch that goes forward through it in training mode sets b and s so that every channel of that batch comes
    out with mean 0 and variance 1; from then on they are ordinary parameters. (Over the batches of all processes where
    torch.distributed runs; where they have been trained by way of the inverse before, they stay.) Until then, and under
    `inverse`, it does with them what it would later: nothing at first. A first step with both directions in one graph
    fails, as it changes them behind an inverse that has run: call `log_prob` on a batch first.

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

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))

    def forward_and_log_det(self, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Output and log-determinant of shape (B,)."""
        self._look_at(x, [0, *range(2, x.ndim)])
        shift, log_scale = (p.view(-1, *[1] * (x.ndim - 2)) for p in (self.shift, self.log_scale))
        return (x + shift) * log_scale.exp(), self._log_det(x)

    def inverse_and_log_det(self, y: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Input and the negative log-determinant."""
        shift, log_scale = (p.view(-1, *[1] * (y.ndim - 2)) for p in (self.shift, self.log_scale))
        return y * (-log_scale).exp() - shift, -self._log_det(y)

    def _log_det(self, x: Tensor) -> Tensor:
        return (self.log_scale.sum() * math.prod(x.shape[2:])).expand(x.shape[0])

    def _initialise(self, mean: Tensor, deviation: Tensor) -> None:
        self.shift.copy_(-mean)
        self.log_scale.copy_(-deviation.log())

    def extra_repr(self) -> str:
        return f"{self.shift.numel()}"


def _mean_and_deviation(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Over `dims` and over the batches of all processes."""
    mean = _mean_over_processes(x.mean(dims, keepdim=True))
    deviation = _mean_over_processes((x - mean).square().mean(dims)).sqrt()
    # What is constant has no scale to learn from.
    return mean.squeeze(dims), torch.where(deviation > 1e-6, deviation, 1.0)


def _mean_over_processes(x: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
        x /= torch.distributed.get_world_size()
    return x
