"""What the engine asks of a layer: a forward, and where it has them an inverse and a log-determinant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from revnet.reversible.autocast import is_autocast_on
from revnet.reversible.buffers import version_of
from revnet.reversible.grid import check_dtype, is_transformed, to_grid
from revnet.reversible.halves import Rearrangement

__all__ = [
    "State",
    "apply_layer",
    "arguments",
    "as_output",
    "as_state",
    "as_stream",
    "check_invertible",
    "invert_layer",
    "is_invertible",
    "on_grid",
]

State = tuple[Tensor, ...]


def is_invertible(layer: nn.Module) -> bool:
    """A layer can be reconstructed through if it has a method `inverse`, a sequence if its layers have."""
    return callable(getattr(layer, "inverse", None)) and getattr(layer, "has_inverse", True)


def check_invertible(layer: nn.Module) -> None:
    """ValueError where a layer is not, or a layer of a sequence, which it names."""
    if is_invertible(layer):
        return
    if isinstance(layer, nn.Module) and callable(getattr(layer, "inverse", None)):
        for inner in layer:  # type: ignore[attr-defined]
            check_invertible(inner)
    raise ValueError(
        f"{type(layer).__name__} cannot be inverted: it has no method `inverse`; "
        f"invert the layers behind it, or replace it by an invertible one"
    )


def as_state(output: Any, layer: nn.Module) -> State:
    """The output of a layer as a tuple of tensors."""
    state = output if isinstance(output, tuple) else (output,)
    if not all(isinstance(x, Tensor | torch.fx.Proxy) for x in state):
        raise TypeError(
            f"{type(layer).__name__} must return a tensor or a tuple of tensors, got {type(output).__name__} "
            f"of {[type(x).__name__ for x in state]}"
        )
    return state


def as_output(state: State) -> Any:
    """What a layer returns for a state: its tensor, or the tuple of several."""
    return state[0] if len(state) == 1 else state


def as_stream(state: State) -> State:
    """The state in fp32 where autocast is on: the residual stream is summed in full precision.

    Branches still run in half precision; only what they are added to is kept wide, as autocast itself does for sums.
    """
    if isinstance(state[0], torch.fx.Proxy):
        return state
    if not is_autocast_on(state[0].device.type):
        return state
    return tuple(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in state)


def on_grid(state: State) -> State:
    """The state rounded to the fixed-point grid of the exact mode."""
    for x in state:
        check_dtype(x)
    return tuple(to_grid(x, x.dtype) for x in state)


def arguments(context: Any) -> dict[str, Any]:
    """The keyword arguments that hand a context to a layer: none where there is no context."""
    return {} if context is None else {"context": context}


def apply_layer(
    layer: nn.Module, state: State, context: Any = None, log_det: Tensor | None = None, exact: bool = False
) -> tuple[State, Tensor | None]:
    """Output of `layer`, and `log_det` (None: not wanted) plus its log-determinant.

    Under `exact` the output of a layer without an inverse is put on the fixed-point grid; the others stay on it.
    """
    with_log_det = getattr(layer, "forward_and_log_det", None)
    if log_det is not None and callable(with_log_det):
        output, term = with_log_det(*state, **arguments(context))
    elif log_det is None or is_invertible(layer):
        output, term = layer(*state, **arguments(context)), None
    else:
        raise TypeError(
            f"{type(layer).__name__} has no log-determinant: it has neither `forward_and_log_det` nor `inverse`; "
            f"leave it out of a flow or give it both"
        )
    state = as_stream(as_state(output, layer))
    if exact and not is_invertible(layer):
        state = on_grid(state)
    elif exact and isinstance(layer, Rearrangement):
        state = tuple(map(_dense, state))  # as it will be when it has been reconstructed: kernels differ in last bits
    return state, log_det if term is None or log_det is None else log_det + term


def _dense(x: Tensor) -> Tensor:
    """The tensor without gaps between its elements, and each of them once."""
    if is_transformed():
        return x
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x if span == x.numel() or not x.numel() else x.clone()


def invert_layer(layer: nn.Module, state: State, context: Any = None) -> State:
    """The input of `layer` that gives `state`."""
    check_invertible(layer)
    versions = [version_of(x) for x in state]
    found = as_state(layer.inverse(*state, **arguments(context)), layer)  # type: ignore[operator]
    if [version_of(x) for x in state] != versions:
        raise ValueError(
            f"{type(layer).__name__} changes in place what its `inverse` is given, which others hold; let it make a "
            f"new tensor"
        )
    return found
