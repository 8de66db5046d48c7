"""The sequence of layers, and what becomes of their activations between the forward and the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from revnet.reversible.activations import Activations, checked, resolved
from revnet.reversible.autocast import Autocast
from revnet.reversible.coupling import Coupling
from revnet.reversible.function import reconstructed
from revnet.reversible.grid import check_dtype
from revnet.reversible.halves import Rearrangement
from revnet.reversible.inverted import invert
from revnet.reversible.layer import State, apply_layer, as_output, as_stream, invert_layer, is_invertible, on_grid
from revnet.reversible.modules import modules_in, parameters_of
from revnet.reversible.recompute import recomputed
from revnet.reversible.run import Run
from revnet.reversible.watch import Watch

__all__ = ["ReversibleSequence"]


def _ordinary_only(sequence: nn.Module) -> bool:
    """Where a custom Function cannot go: torch.func, forward-mode AD, tracing, export, cached parametrizations."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch.jit.is_tracing()
        or torch.compiler._is_exporting_flag  # `is_exporting()` is true in whatever the compiler of torch 2.11 compiles
        # Cached weights are computed outside of the branches: nothing inside could send them a gradient.
        or (parametrize._cache_enabled > 0 and any(map(parametrize.is_parametrized, sequence.modules())))
    )


class ReversibleSequence(nn.Sequential):
    """y = layers[-1](... layers[0](x)), with a choice of what is kept for the backward pass.

    `activations` says what becomes of a layer's activations between the forward and the backward pass: "store" keeps
    all that autograd saves (ordinary backpropagation), "recompute" keeps the layer's input and evaluates it again
    (torch's checkpoint; the additive coupling behind a layer without an inverse is undone, which costs the same and
    keeps less), "reconstruct" keeps nothing and computes the layer's input from its output. Weights,
    `state_dict` and output are the same under all three; gradients are equal up to the rounding of the reconstruction.

    Source: Gomez, Ren, Urtasun, Grosse 2017 (The Reversible Residual Network), section 3.2, with one evaluation of each
    branch in the backward pass instead of two.

    Args:
        layers: modules from state to state. The state is one tensor or a pair of halves. A layer with a method
            `inverse` can be reconstructed through; one without (a strided transition, say) keeps its input and is
            recomputed under `activations="reconstruct"`.
        activations: one of the three values, or a plan: one value for each layer. A plan that asks a layer without an
            inverse to reconstruct raises ValueError.
        exact: True keeps the state on a fixed-point grid (multiples of 2^-16 in fp32, of 2^-32 in fp64), where
            subtraction undoes addition to the bit: gradients under "reconstruct" and "recompute" are then equal, bit
            for bit, to those under "store" with the same flag, in fp32 and under half-precision autocast (those of what
            several layers share, up to the order of its sum). The state is rounded on entry and behind every layer
            without an inverse, what a branch returns before it is added; the gradient passes straight through. It holds
            values below 256 in fp32 (2^21 in fp64), and what is below half a step becomes 0; a checksum of the whole
            state finds on the way back if any went beyond, and `reconstruction_error` is then more than 0. Additive
            couplings only (ValueError for others), fp32 or fp64 state only (TypeError). None, the default, is True for
            an fp32 state where every layer allows it (it costs a few percent of a step on a CPU), False elsewhere: fp64
            hardly drifts.

    Attributes:
        reconstruction_error: ||reconstructed - true|| / ||true|| of the last backward pass, the worst of the stretches
            of reconstructed layers, measured on a sample of their input that covers every channel; a 0-dim tensor on
            the device. None from a forward pass with gradients to its backward pass, and if that reconstructs nothing.
        watch: the thresholds of that error, `watch.warn_above` and `watch.raise_above`; see `Watch`.
        check_determinism: True compares a few values of what a branch (a recomputed layer) returns in the backward pass
            with those of the forward pass and raises RuntimeError, naming it, where they differ by more than
            `watch.warn_above` allows. It waits for the device at every branch: for debugging. False by default.
        chunk_size: after how many reconstructed layers the backward pass hands over the gradients that it has; None,
            the default, for all at the end of a stretch of them. With 4, say, DistributedDataParallel averages them
            while the backward pass goes on, and fewer of them wait; each chunk keeps its output.

    Memory under "reconstruct" is the sequence's output and the activations of one branch, whatever the depth. Use
    "store" where memory is not short: it is the fastest. Under "reconstruct" the graph is differentiated once only
    (`create_graph=True` raises; "store", or a plan of "recompute" for every layer, allow it); under torch.func, tracing
    and export the layers run as under "store".

    Example:
        >>> import torch
        >>> from revnet import ReversibleBlock, ReversibleSequence
        >>> blocks = [ReversibleBlock(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)) for _ in range(4)]
        >>> sequence = ReversibleSequence(blocks, activations="reconstruct")
        >>> x1, x2 = torch.randn(2, 5, 3)
        >>> y1, y2 = sequence(x1, x2)
        >>> torch.allclose(sequence.inverse(y1, y2)[1], x2, atol=1e-5)
        True
    """

    check_determinism = False

    def __init__(
        self, layers: Iterable[nn.Module], activations: Activations = "reconstruct", exact: bool | None = None
    ) -> None:
        super().__init__(*layers)
        self.exact = exact
        self._errors: dict[int, Tensor] = {}
        self._inspected: set[nn.Module] = set()
        self._inverted: tuple[tuple[nn.Module, ...], ReversibleSequence] | None = None
        self._chunk_size: int | None = None
        self.watch = Watch()
        self.activations = activations

    @property
    def activations(self) -> Activations:
        """The value, or the plan as a tuple of one value for each layer."""
        return self._activations

    @activations.setter
    def activations(self, activations: Activations) -> None:
        self._activations = checked(list(self), activations)
        self._errors.clear()
        self._inspected.clear()

    @property
    def reconstruction_error(self) -> Tensor | None:
        if not self._errors:
            return None
        first, *others = self._errors.values()
        return torch.stack([first, *(other.to(first.device) for other in others)]).amax()

    @property
    def has_inverse(self) -> bool:
        """Whether `inverse` works: every layer has one."""
        return all(map(is_invertible, self))

    def plan(self) -> tuple[str, ...]:
        """What is done for each layer: the plan, or what the single value comes to (see `resolved`)."""
        return resolved(list(self), self._activations)

    def forward(self, x1: Tensor, x2: Tensor | None = None, context: Any = None) -> Any:
        """The output state for the input state: a tensor, or a pair of halves.

        Args:
            x1, x2: the two halves; x1 alone where the first layer takes one tensor.
            context: extra input of every branch (a tensor, or tuples, lists and dicts of tensors), passed as
                `branch(x, context)`; gradients reach it.
        """
        return as_output(self._run((x1,) if x2 is None else (x1, x2), context, None)[0])

    def forward_and_log_det(self, x1: Tensor, x2: Tensor | None = None, context: Any = None) -> tuple[Any, Tensor]:
        """The output state and log |det dy/dx|, of shape (B,): exactly 0 for additive couplings."""
        state, log_det = self._run((x1,) if x2 is None else (x1, x2), context, x1.new_zeros(x1.shape[0]))
        assert log_det is not None
        return as_output(state), log_det

    def inverse(self, y1: Tensor, y2: Tensor | None = None, context: Any = None) -> Any:
        """The input state that `forward` maps to (y1, y2). Gradients through it are those of ordinary autograd.

        It keeps all that autograd saves, whatever `activations` says: to train through the inverse, call `inv`.

        Raises:
            ValueError: a layer has no inverse.
        """
        state: State = (y1,) if y2 is None else (y1, y2)
        if self._settle_exact(state):
            for y in state:
                check_dtype(y)
        for layer in reversed(self):
            state = as_stream(invert_layer(layer, state, context))
        return as_output(state)

    @property
    def inv(self) -> ReversibleSequence:
        """The sequence of the inverted layers, last first: its `forward` is `inverse`, with this sequence's memory.

        It shares parameters, `watch` and `reconstruction_error` with this one, and takes its `activations`, `exact`,
        `check_determinism` and `chunk_size` whenever it is asked for. It holds the same branches, each still evaluated
        once in the backward pass, and its log-determinant is the negative.

        Raises:
            ValueError: a layer has no inverse.

        Example:
            >>> import torch
            >>> from revnet import ReversibleBlock, ReversibleSequence
            >>> sequence = ReversibleSequence([ReversibleBlock(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))])
            >>> z1, z2 = torch.randn(2, 5, 3)
            >>> (x1, x2), log_det = sequence.inv.forward_and_log_det(z1, z2)  # keeps no activations either
            >>> x1.sum().backward()
        """
        layers = tuple(self)
        if self._inverted is None or self._inverted[0] != layers:
            self._inverted = (layers, ReversibleSequence(map(invert, reversed(layers)), "store"))
        for layer in layers:
            if isinstance(layer, ReversibleSequence):
                invert(layer)  # which is known already, and takes what was switched since
        inverted, activations = self._inverted[1], self._activations
        inverted._activations = activations if isinstance(activations, str) else tuple(reversed(activations))
        inverted._exact, inverted.check_determinism = self._exact, self.check_determinism
        inverted._chunk_size = self._chunk_size
        inverted.watch, inverted._errors = self.watch, self._errors
        return inverted

    def _run(self, state: State, context: Any, log_det: Tensor | None) -> tuple[State, Tensor | None]:
        _check_state(state, self)
        if isinstance(state[0], torch.fx.Proxy):
            return self._traced(state, context), log_det
        autocast = Autocast.current(state[0].device).enabled
        # A cached half-precision copy of a weight used twice would sum its gradient in half precision. Without autocast
        # the flag is left alone: compiled branches would be compiled again for the other value in the backward pass.
        uncache = autocast and torch.is_autocast_cache_enabled()
        if uncache:
            torch.set_autocast_cache_enabled(False)
        try:
            state = as_stream(state)
            _check_halves(state)
            exact = self._settle_exact(state)
            first = 0
            for value, layers in self._runs(state, context):
                enters_grid = exact and first == 0 and is_invertible(layers[0])
                if value == "store":
                    if enters_grid:
                        state = on_grid(state)
                    for layer in layers:
                        state, log_det = apply_layer(layer, state, context, log_det, exact)
                else:
                    tolerance = self.watch.tolerance(autocast, exact) if self.check_determinism else None
                    # What "recompute" reconstructs is a half that no gradient depends on.
                    report = partial(self._report, first, autocast, exact, self._activations != "recompute")
                    run = Run(layers, first, exact, enters_grid, tolerance, report, self._inspected)
                    state, log_det = _apply(value)(run, state, context, log_det)
                first += len(layers)
            return state, log_det
        finally:
            if uncache:
                torch.set_autocast_cache_enabled(True)

    @property
    def exact(self) -> bool | None:
        """Whether the stream is kept on a fixed-point grid; None for the default."""
        return self._exact

    @exact.setter
    def exact(self, exact: bool | None) -> None:
        if exact not in (True, False, None):
            raise ValueError(f"exact must be True, False or None (the default); got {exact!r}")
        if exact:
            self._check_exact()
        self._exact = exact

    @property
    def chunk_size(self) -> int | None:
        """After how many layers the backward pass hands over their gradients; None for all at its end."""
        return self._chunk_size

    @chunk_size.setter
    def chunk_size(self, chunk_size: int | None) -> None:
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise ValueError(f"chunk_size={chunk_size!r}: give a number of layers, at least 1, or None")
        self._chunk_size = chunk_size

    def _check_exact(self) -> None:
        for index, layer in enumerate(self):
            if not _can_be_exact(layer):
                raise ValueError(
                    f"exact=True: layer {index} ({type(layer).__name__}) cannot be undone to the bit: it is no "
                    f"additive coupling, Split, Merge or other rearrangement; use additive couplings, or exact=False"
                )

    def __getitem__(self, index: Any) -> Any:
        """A layer, or for a slice a sequence over these layers with their part of the plan."""
        if not isinstance(index, slice):
            return super().__getitem__(index)
        whole = self._activations
        part = ReversibleSequence(list(self)[index], whole if isinstance(whole, str) else whole[index], self._exact)
        part.watch = copy(self.watch)
        part.check_determinism, part.chunk_size = self.check_determinism, self.chunk_size
        return part

    def _report(self, first: int, autocast: bool, exact: bool, uses_it: bool, error: Tensor) -> None:
        if not uses_it:
            return
        # A sequence may run more than once in a step.
        known = self._errors.get(first)
        self._errors[first] = error if known is None else torch.maximum(known, error)
        self.watch.see(error, autocast, exact)

    def _settle_exact(self, state: State) -> bool:
        exact = self._exact
        if exact is None:
            exact = all(x.dtype == torch.float32 for x in state) and self._can_be_exact()
        elif exact:
            self._check_exact()
        for layer in self:
            if isinstance(layer, Coupling):
                layer.exact = exact
        return exact

    def _can_be_exact(self) -> bool:
        """Whether there is something to be undone to the bit, and nothing that cannot be."""
        return any(isinstance(layer, Coupling) for layer in self) and all(map(_can_be_exact, self))

    def _traced(self, state: State, context: Any) -> State:
        """In a symbolic trace a sequence is a leaf, which keeps its memory saving."""
        tracer = state[0].tracer  # type: ignore[attr-defined]
        if tracer.root is self:
            raise TypeError("a reversible sequence is a leaf of symbolic traces; trace a module that holds it")
        arguments = (*state, *([None] * (2 - len(state))), context)
        return (tracer.create_proxy("call_module", tracer.path_of_module(self), arguments, {}),)

    def _runs(self, state: State, context: Any) -> Iterator[tuple[str, tuple[nn.Module, ...]]]:
        """Consecutive layers of one value: all that are stored, one that is recomputed, a chunk to reconstruct."""
        plan = list(self.plan())
        if not torch.is_grad_enabled() or _ordinary_only(self):
            plan = ["store"] * len(plan)
        else:
            self._errors.clear()
            if not torch.compiler.is_compiling():
                self._inspected.intersection_update(self)  # a layer that was replaced may go
            self.watch.judge_arrived()
            if getattr(self, "_is_replica", False) and set(plan) != {"store"}:
                raise ValueError(
                    "nn.DataParallel replicates a reversible sequence without its parameters, which its backward pass "
                    'needs; take torch.nn.parallel.DistributedDataParallel, or activations="store"'
                )
            if not any(x.requires_grad for x in (*state, *pytree.tree_leaves(context)) if isinstance(x, Tensor)):
                # Frozen layers ahead of the first trainable one have no backward pass, so nothing is kept for them.
                trainable = (
                    any(p.requires_grad for m in modules_in(layer) for _, p in parameters_of(m)) for layer in self
                )
                frozen = next((index for index, found in enumerate(trainable) if found), len(plan))
                plan[:frozen] = ["store"] * frozen
        for value, pairs in groupby(zip(plan, self, strict=True), key=itemgetter(0)):
            layers = tuple(layer for _, layer in pairs)
            size = 1 if value == "recompute" else self._chunk_size or len(layers)
            for first in range(0, len(layers), size):
                yield value, layers[first : first + size]

    def extra_repr(self) -> str:
        return f"activations={self._activations!r}, exact={self._exact}"


def _apply(value: str) -> Callable[[Run, State, Any, Tensor | None], tuple[State, Tensor | None]]:
    if torch.compiler.is_compiling():
        # The compiler would give the first evaluation of a branch and the second, which needs a graph, other bits.
        from revnet.reversible.eager import recomputed_eagerly, reconstructed_eagerly

        return reconstructed_eagerly if value == "reconstruct" else recomputed_eagerly
    return reconstructed if value == "reconstruct" else recomputed


def _can_be_exact(layer: nn.Module) -> bool:
    if isinstance(layer, Coupling):
        return layer.is_additive()
    return isinstance(layer, Rearrangement) or not is_invertible(layer)


def _check_state(state: State, layers: Iterable[nn.Module]) -> None:
    for name, x in zip(("x1", "x2"), state, strict=False):
        if not isinstance(x, Tensor | torch.fx.Proxy):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}; pass the halves as two arguments")
    first = next(iter(layers), None)
    if len(state) == 1 and isinstance(first, Coupling):
        raise TypeError(
            f"x2 is missing: layer 0 ({type(first).__name__}) takes two halves; pass both, or let the sequence begin "
            f"with Split()"
        )


def _check_halves(state: State) -> None:
    if len(state) == 2 and (state[0].dtype, state[0].device) != (state[1].dtype, state[1].device):
        x1, x2 = state
        raise TypeError(
            f"x1 and x2 must agree in dtype and device: x1 is {x1.dtype} on {x1.device}, x2 is {x2.dtype} on "
            f"{x2.device}; convert one of them"
        )
