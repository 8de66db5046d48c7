"""Layers whose input is kept and that the backward pass evaluates again: torch's checkpoint, repeated to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revnet.reversible.coupling import Coupling
from revnet.reversible.evaluation import Evaluation, observe
from revnet.reversible.layer import State, apply_layer, on_grid
from revnet.reversible.modules import modules_in
from revnet.reversible.run import ContextStructure, Run

__all__ = ["recomputed"]


def recomputed(run: Run, state: State, context: Any, log_det: Tensor | None) -> tuple[State, Tensor | None]:
    """The output of the run's one layer, and `log_det` plus its log-determinant if it is not None.

    torch's checkpoint keeps the input, and breaks the second evaluation off where nothing is left to save, ahead of a
    block's last convolution. Ours is what makes it equal to the first: random numbers, buffers, modes and parameters;
    running statistics count once.
    """
    (layer,) = run.layers
    structure = ContextStructure(context)
    parameters = run.parameters()
    versions: list[tuple[Tensor, int]] = []
    first: Evaluation | None = None
    failures: list[BaseException] = []

    def begins(evaluation: Evaluation) -> None:
        # A branch that differentiates inside itself is evaluated again before its first evaluation is over.
        nonlocal first
        first = evaluation

    def evaluate(log_det: Tensor | None, *tensors: Tensor) -> tuple[State, Tensor | None] | None:
        nonlocal first
        state, context_tensors = tensors[: len(tensors) - structure.count], tensors[len(tensors) - structure.count :]
        context = structure.rebuild(context_tensors)

        def apply(*state: Tensor) -> tuple[State, Tensor | None]:
            entered = on_grid(state) if run.enters_grid else state
            return apply_layer(layer, entered, context, log_det, run.exact)

        if first is None:
            before = [c._version for c in context_tensors]
            try:
                result, first = observe(layer, state, apply, begins)
                structure.check_unchanged(context, context_tensors, before)
            except BaseException as failure:
                failures.append(failure)  # raised below: torch 2.11 keeps its hooks in place where this raises
                return None
            if run.tolerance is not None:
                first = first.sampled(result[0])
            versions.extend((p, p._version) for p in parameters)  # behind it: an embedding with max_norm writes to them
            return result
        run.check_unchanged(versions)
        with first.aliased(), first.surroundings(None), _exact_as_then(layer, run.exact):
            result = apply(*state)
        run.check_repeated(layer, first, result[0])
        return result

    tensors = (*state, *structure.tensors(context))
    # RReLU saves its noise ahead of drawing it: a second evaluation that breaks off there would leave it undrawn.
    breaks_off = run.tolerance is None and not any(isinstance(m, nn.RReLU) for m in modules_in(layer))
    result = checkpoint(
        evaluate, log_det, *tensors, use_reentrant=False, preserve_rng_state=False, early_stop=breaks_off
    )
    if result is None:
        raise failures.pop()  # which would hold this frame, and with it the state, in a cycle
    state, found = result
    # The checkpoint holds what it was given, which somebody may add to in place.
    return state, found.clone() if found is not None and found is log_det else found


@contextmanager
def _exact_as_then(layer: nn.Module, exact: bool) -> Iterator[None]:
    """Lets a coupling compute as in the forward pass: it may have been switched since."""
    if not isinstance(layer, Coupling):
        yield
        return
    now, layer.exact = layer.exact, exact
    try:
        yield
    finally:
        layer.exact = now
