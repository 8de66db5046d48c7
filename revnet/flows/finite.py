"""Catches NaN and infinity where they leave a flow, and names the layer that they come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from revnet.flows.splits import FactorOut
from revnet.reversible import ReversibleSequence, invert
from revnet.reversible.layer import State, apply_layer

__all__ = ["NonFiniteError", "check_finite", "has_values"]


class NonFiniteError(RuntimeError):
    """A flow or its inverse gave values that are NaN or infinite; the message names the first layer that did."""


def has_values(x: Tensor) -> bool:
    """Whether the values of a tensor can be looked at: not on the meta device, nor while it is traced."""
    return not (
        x.device.type == "meta"
        or isinstance(x, FakeTensor)
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
    )


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in tensors)


def check_finite(
    stages: Iterable[ReversibleSequence], start: State, context: Any, result: State, inverse: bool = False
) -> None:
    """Raises NonFiniteError where `result`, what the stages of a flow or their inverse gave, is not finite.

    Args:
        stages: of the flow.
        start: what went in: an example, or for the inverse the latents.
        context: extra input of the branches.
        result: what came out.
        inverse: whether the inverse ran.
    """
    if not has_values(result[0]) or _all_finite(result):
        return
    if not _all_finite(start):
        raise NonFiniteError(
            f"the {'latents' if inverse else 'examples'} hold values that are NaN or infinite; leave these out"
        )
    *latents, last = start
    state: State = (last,)
    layers = [(f"stages.{i}.{j}", layer) for i, stage in enumerate(stages) for j, layer in enumerate(stage)]
    with torch.no_grad():
        for name, layer in reversed(layers) if inverse else layers:
            if inverse and isinstance(layer, FactorOut):
                state = (*state, latents.pop())
            log_det = state[0].new_zeros(len(state[0]))
            state, term = apply_layer(invert(layer) if inverse else layer, state, context, log_det)
            if not _all_finite((*state, *([] if term is None else [term]))):
                raise NonFiniteError(
                    f"the {'inverse' if inverse else 'output'} of {name} ({type(layer).__name__}) has values that are "
                    f"NaN or infinite, though what goes in is finite: its parameters have grown too large or are NaN; "
                    f"bound the log-scale, lower the learning rate or clip gradients"
                )
            if not inverse:
                state = state[:1] if isinstance(layer, FactorOut) else state
    raise NonFiniteError(
        "the flow has values that are NaN or infinite, which its layers, run one by one, do not give again: a branch "
        "draws random numbers or is not deterministic; make it a function of its input, or run the flow in float64"
    )
