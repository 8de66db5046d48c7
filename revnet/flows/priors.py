"""The distributions of the latent variables: the standard normal and the standard logistic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, constraints
from torch.nn.functional import softplus

__all__ = ["PRIORS", "Logistic"]


class Logistic(Distribution):
    """log p(z) = -softplus(z) - softplus(-z): the standard logistic distribution, every component for itself.

    Source: Dinh, Krueger, Bengio 2014 (NICE), section 3.4.

    Args:
        loc: a tensor that says shape, dtype and device; the distribution is around it.

    Example:
        >>> import torch
        >>> from revnet.flows import Logistic
        >>> Logistic(torch.zeros(3)).log_prob(torch.zeros(3)).exp()
        tensor([0.2500, 0.2500, 0.2500])
    """

    arg_constraints = {"loc": constraints.real}  # noqa: RUF012 (torch's own declaration)
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor, validate_args: bool | None = None) -> None:
        self.loc = loc
        super().__init__(loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Logistic:
        """The same for more batch dimensions."""
        return Logistic(self.loc.expand(batch_shape), validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return torch.full_like(self.loc, torch.pi**2 / 3)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density, component by component."""
        centred = value - self.loc
        return -softplus(centred) - softplus(-centred)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """A sample, differentiable with respect to `loc`."""
        shape = self._extended_shape(torch.Size(sample_shape))
        tiny = torch.finfo(self.loc.dtype).eps
        u = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device).clamp(tiny, 1 - tiny)
        return self.loc + u.log() - (-u).log1p()


def _normal(loc: Tensor) -> Distribution:
    return Independent(Normal(loc, torch.ones_like(loc), validate_args=False), 1, validate_args=False)


def _logistic(loc: Tensor) -> Distribution:
    return Independent(Logistic(loc, validate_args=False), 1, validate_args=False)


PRIORS: dict[str, Callable[[Tensor], Distribution]] = {"normal": _normal, "logistic": _logistic}
