"""The invertible 1x1 convolution: a learnt mixing of the channels."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from revnet.flows.bijection import Bijection
from revnet.reversible.autocast import has_autocast

__all__ = ["InvertibleConvolution"]


class InvertibleConvolution(Bijection):
    """y = W x at every position, with W = P L (U + diag(sign * exp(s))); log-determinant sum(s) times the positions.

    P is a fixed permutation, L lower triangular with ones on its diagonal, U strictly upper triangular; W begins as a
    random rotation.

    Source: Kingma, Dhariwal 2018 (Glow), section 3.2.

    Args:
        channels: size of dimension 1; any number of dimensions may follow, or none.

    W is inverted in float64, and autocast is off inside: an error of half precision could not be undone.

    Example:
        >>> import torch
        >>> from revnet.flows import InvertibleConvolution
        >>> layer, x = InvertibleConvolution(8), torch.randn(2, 8, 4, 4)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)
        True
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
        permutation, lower, upper = (m.to(torch.get_default_dtype()) for m in torch.linalg.lu(rotation))
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", upper.diag().sign())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_scale = nn.Parameter(upper.diag().abs().log())

    def weight(self) -> Tensor:
        """W, of shape (C, C)."""
        lower = self.lower.tril(-1) + torch.eye(len(self.sign), dtype=self.lower.dtype, device=self.lower.device)
        return self.permutation @ lower @ (self.upper.triu(1) + torch.diag(self.sign * self.log_scale.exp()))

    def forward_and_log_det(self, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Output and log-determinant of shape (B,)."""
        with _in_full_precision(x):
            return _mixed(self.weight(), x), self._log_det(x)

    def inverse_and_log_det(self, y: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Input and the negative log-determinant."""
        with _in_full_precision(y):
            return _mixed(torch.linalg.inv(self.weight().double()), y), -self._log_det(y)

    def _log_det(self, x: Tensor) -> Tensor:
        return (self.log_scale.sum() * math.prod(x.shape[2:])).expand(x.shape[0])

    def extra_repr(self) -> str:
        return f"{len(self.sign)}"


def _in_full_precision(x: Tensor) -> AbstractContextManager[Any]:
    return torch.autocast(x.device.type, enabled=False) if has_autocast(x.device.type) else nullcontext()


def _mixed(weight: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("ij,bj...->bi...", weight.to(x.dtype), x)
