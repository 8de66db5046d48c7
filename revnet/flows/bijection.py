"""What the layers of a flow that are no couplings have in common, and how one acts on a single half of the state."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["Bijection", "OnHalf"]


class Bijection(nn.Module):
    """A layer from tensor to tensor that says what it does in `forward_and_log_det` and `inverse_and_log_det`.

    Both return a tensor and the logarithm of the absolute determinant of their own Jacobian, of shape (B,).
    """

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        return self.forward_and_log_det(x, context)[0]

    def inverse(self, y: Tensor, context: Any = None) -> Tensor:
        """The input that `forward` maps to y."""
        return self.inverse_and_log_det(y, context)[0]

    def forward_and_log_det(self, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Output and log |det dy/dx|."""
        raise NotImplementedError(f"{type(self).__name__} must define `forward_and_log_det`")

    def inverse_and_log_det(self, y: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Input and log |det dx/dy|, the negative."""
        raise NotImplementedError(f"{type(self).__name__} must define `inverse_and_log_det`")


class OnHalf(nn.Module):
    """(x1, x2) -> (layer(x1), x2), or (x1, layer(x2)).

    Args:
        layer: a `Bijection`.
        half: 0 or 1, the half that it acts on.

    Raises:
        ValueError: another `half`.

    Example:
        >>> import torch
        >>> from revnet.flows import OnHalf, Scaling
        >>> x1, x2 = torch.randn(2, 4, 3)
        >>> (y1, y2), log_det = OnHalf(Scaling((3,)), half=1).forward_and_log_det(x1, x2)
        >>> y1 is x1
        True
    """

    def __init__(self, layer: Bijection, half: int) -> None:
        super().__init__()
        if half not in (0, 1):
            raise ValueError(f"half={half!r}: give 0 for the first half of the state or 1 for the second")
        self.layer = layer
        self.index = half

    def forward(self, x1: Tensor, x2: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        return self.forward_and_log_det(x1, x2, context)[0]

    def inverse(self, y1: Tensor, y2: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """The halves that `forward` maps to (y1, y2)."""
        return self.inverse_and_log_det(y1, y2, context)[0]

    def forward_and_log_det(self, x1: Tensor, x2: Tensor, context: Any = None) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The halves and the log-determinant of shape (B,)."""
        y, log_det = self.layer.forward_and_log_det((x1, x2)[self.index], context)
        return ((x1, y) if self.index else (y, x2)), log_det

    def inverse_and_log_det(self, y1: Tensor, y2: Tensor, context: Any = None) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The halves and the log-determinant of the inverse."""
        x, log_det = self.layer.inverse_and_log_det((y1, y2)[self.index], context)
        return ((y1, x) if self.index else (x, y2)), log_det

    def extra_repr(self) -> str:
        return f"half={self.index}"
