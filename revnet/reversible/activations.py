"""What may become of the activations of each layer of a sequence, and what is done for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from revnet.reversible.coupling import AdditiveCoupling
from revnet.reversible.halves import Rearrangement
from revnet.reversible.layer import is_invertible

__all__ = ["ACTIVATIONS", "Activations", "checked", "checked_value", "resolved"]

Activations = str | Sequence[str]
ACTIVATIONS = ("store", "recompute", "reconstruct")


def checked_value(value: Any) -> str:
    """`value`, if it is one of `ACTIVATIONS`; else ValueError."""
    if value not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {', '.join(map(repr, ACTIVATIONS))}; got {value!r}")
    return value


def checked(layers: Sequence[nn.Module], activations: Activations) -> Activations:
    """The value, or the plan as a tuple; ValueError if these layers cannot take it."""
    if isinstance(activations, str) or not isinstance(activations, Iterable):
        return checked_value(activations)
    plan = tuple(checked_value(value) for value in activations)
    if len(plan) != len(layers):
        raise ValueError(
            f"activations: a plan needs one value for each layer; got {len(plan)} values for {len(layers)} layers"
        )
    for index, (value, layer) in enumerate(zip(plan, layers, strict=True)):
        if value == "reconstruct" and not is_invertible(layer):
            raise ValueError(
                f"activations: the plan asks layer {index} ({type(layer).__name__}) to reconstruct, but it has "
                f'no inverse; give it "recompute" or "store"'
            )
    return plan


def resolved(layers: Sequence[nn.Module], activations: Activations) -> tuple[str, ...]:
    """What is done for each layer.

    A plan is followed to the letter. Under "reconstruct" layers without an inverse are recomputed. Under "recompute"
    rearrangements (`Split`, `Merge`, `Squeeze`) are stored, since ordinary backpropagation keeps nothing of them. An
    `AdditiveCoupling` right behind a layer without an inverse is then reconstructed: of its input only the half that it
    leaves alone is used again, so undoing it is exact, costs no more than doing it again, and its input need not be
    kept.
    """
    if not isinstance(activations, str):
        return tuple(checked(layers, activations))
    if activations == "reconstruct":
        return tuple("reconstruct" if is_invertible(layer) else "recompute" for layer in layers)
    if activations == "recompute":
        return tuple(map(_under_recompute, [None, *layers], layers))
    return ("store",) * len(layers)


def _under_recompute(before: nn.Module | None, layer: nn.Module) -> str:
    if isinstance(layer, Rearrangement):
        return "store"
    if before is not None and not is_invertible(before) and _is_plain(layer):
        return "reconstruct"
    return "recompute"


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is an additive coupling and nothing besides."""
    return type(layer) is AdditiveCoupling and not (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
    )
