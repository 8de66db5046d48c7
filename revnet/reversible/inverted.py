"""A layer run backwards: its inverse as the forward pass of a layer of its own, on the same parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from revnet.reversible.coupling import ADDITIVE, Addition, Coupling, Step
from revnet.reversible.halves import Rearrangement
from revnet.reversible.layer import arguments, as_output, check_invertible, invert_layer

__all__ = ["invert"]


def invert(layer: nn.Module) -> nn.Module:
    """The layer whose `forward` is the `inverse` of `layer`, with shared parameters.

    A coupling gives a coupling, a rearrangement a rearrangement, and an inverted layer the layer itself. The
    log-determinant is the negative: taken from the layer's `inverse_and_log_det` where it has that method, else from
    its `forward_and_log_det` at the input that `inverse` finds.

    Raises:
        ValueError: the layer has no inverse.

    Example:
        >>> import torch
        >>> from revnet.reversible import Split, invert
        >>> invert(Split())(torch.randn(2, 3), torch.randn(2, 3)).shape
        torch.Size([2, 6])
    """
    if isinstance(getattr(type(layer), "inv", None), property):
        known = layer.inv
        if isinstance(known, nn.Module):  # of a sequence, or of an inverted layer
            return known
    if isinstance(layer, Coupling):
        return _InvertedCoupling(layer)
    check_invertible(layer)
    return _InvertedRearrangement(layer) if isinstance(layer, Rearrangement) else _Inverted(layer)


class _InvertedCoupling(Coupling):
    """The moves of a coupling in reverse order, each with move and undo exchanged."""

    def __init__(self, layer: Coupling) -> None:
        super().__init__()
        self.layer = layer

    @property
    def inv(self) -> nn.Module:
        return self.layer

    # One flag for both directions: the moves are the coupling's own.
    @property
    def exact(self) -> bool:
        return self.layer.exact

    @exact.setter
    def exact(self, exact: bool) -> None:
        self.layer.exact = exact

    def steps(self) -> tuple[Step, ...]:
        return _inverted(self.layer.steps())

    def moves(self) -> tuple[Step, ...]:
        return _inverted(self.layer.moves())


def _inverted(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    for _, _, rule in steps:
        of_another = isinstance(rule, Addition) and type(rule) not in ADDITIVE and "inverse" not in vars(type(rule))
        if of_another or not hasattr(rule, "inverse"):
            raise TypeError(f"{type(rule).__name__} has no `inverse`, the rule whose move is its undo; give it one")
    return tuple(Step(branch, moved, rule.inverse) for branch, moved, rule in reversed(steps))


class _Inverted(nn.Module):
    """Any other layer with forward and inverse exchanged."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @property
    def inv(self) -> nn.Module:
        return self.layer

    def forward(self, y1: Tensor, y2: Tensor | None = None, context: Any = None) -> Any:
        return as_output(invert_layer(self.layer, _state(y1, y2), context))

    def inverse(self, x1: Tensor, x2: Tensor | None = None, context: Any = None) -> Any:
        """The input of this layer: the output of the one that it inverts."""
        return self.layer(*_state(x1, x2), **arguments(context))

    def forward_and_log_det(
        self, y1: Tensor, y2: Tensor | None = None, context: Any = None
    ) -> tuple[Any, Tensor | None]:
        """Output and log-determinant of shape (B,), or None where it is exactly 0."""
        given = getattr(self.layer, "inverse_and_log_det", None)
        if callable(given):
            return given(*_state(y1, y2), **arguments(context))
        x = invert_layer(self.layer, _state(y1, y2), context)
        there = getattr(self.layer, "forward_and_log_det", None)
        log_det = there(*x, **arguments(context))[1] if callable(there) else None
        return as_output(x), None if log_det is None else -log_det


class _InvertedRearrangement(_Inverted, Rearrangement):
    """A rearrangement brought back."""

    layer: Rearrangement

    @property
    def fixed(self) -> bool:  # type: ignore[override]
        return self.layer.fixed


def _state(first: Tensor, second: Tensor | None) -> tuple[Tensor, ...]:
    return (first,) if second is None else (first, second)
