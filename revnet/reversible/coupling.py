"""Couplings: one half of the state is moved by a function of the other half, and can be moved back."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from revnet.reversible.evaluation import call, observe
from revnet.reversible.grid import add_on_grid, subtract_on_grid
from revnet.reversible.layer import as_state
from revnet.reversible.tape import tape_of

__all__ = ["AdditiveCoupling", "AffineCoupling", "Coupling", "ReversibleBlock", "Step"]


class Rule(Protocol):
    """How the output `h` of a branch moves the half `x`, and how it is moved back (into `out`, which may be y)."""

    def move(self, x: Tensor, h: Any) -> tuple[Tensor, Tensor | None]: ...

    def undo(self, y: Tensor, h: Any, out: Tensor | None = None) -> Tensor: ...

    @property
    def inverse(self) -> Rule:
        """The rule whose move is this one's undo, and the other way round."""
        ...


class Addition:
    """y = x + h; its log-determinant is exactly 0."""

    def move(self, x: Tensor, h: Any) -> tuple[Tensor, None]:
        _check_branch_output(h, x)
        return x + h, None

    def undo(self, y: Tensor, h: Any, out: Tensor | None = None) -> Tensor:
        return torch.sub(y, h, out=out)

    def gradient(self, grad: Tensor | None) -> Tensor | None:
        """That of h, given that of y."""
        return grad

    @property
    def inverse(self) -> Rule:
        return SUBTRACTION


class _Subtraction(Addition):
    """y = x - h."""

    def move(self, x: Tensor, h: Any) -> tuple[Tensor, None]:
        _check_branch_output(h, x)
        return x - h, None

    def undo(self, y: Tensor, h: Any, out: Tensor | None = None) -> Tensor:
        return torch.add(y, h, out=out)

    def gradient(self, grad: Tensor | None) -> Tensor | None:
        return None if grad is None else -grad

    @property
    def inverse(self) -> Rule:
        return ADDITION


class _ExactAddition(Addition):
    """y = x + h with h rounded to the fixed-point grid that x lies on: `undo` gives back every bit of x."""

    def move(self, x: Tensor, h: Any) -> tuple[Tensor, None]:
        _check_branch_output(h, x)
        return add_on_grid(x, h), None

    def undo(self, y: Tensor, h: Any, out: Tensor | None = None) -> Tensor:
        return subtract_on_grid(y, h, out)

    @property
    def inverse(self) -> Rule:
        return EXACT_SUBTRACTION


class _ExactSubtraction(_Subtraction):
    """y = x - h on the grid."""

    def move(self, x: Tensor, h: Any) -> tuple[Tensor, None]:
        _check_branch_output(h, x)
        return subtract_on_grid(x, h), None

    def undo(self, y: Tensor, h: Any, out: Tensor | None = None) -> Tensor:
        return add_on_grid(y, h, out)

    @property
    def inverse(self) -> Rule:
        return EXACT_ADDITION


class _Affine:
    """y = x * exp(s) + t with h = (s, t); its log-determinant is the sum of s over all but the batch dimension."""

    def move(self, x: Tensor, h: Any) -> tuple[Tensor, Tensor]:
        log_scale, shift = _log_scale_and_shift(h, x)
        return x * log_scale.exp() + shift, log_scale.flatten(1).sum(1)

    def undo(self, y: Tensor, h: Any, out: Tensor | None = None) -> Tensor:
        log_scale, shift = _log_scale_and_shift(h, y)
        return torch.mul(torch.sub(y, shift, out=out), torch.exp(-log_scale), out=out)

    @property
    def inverse(self) -> Rule:
        return INVERSE_AFFINE


class _InverseAffine:
    """y = (x - t) * exp(-s) with h = (s, t); its log-determinant is minus the sum of s."""

    def move(self, x: Tensor, h: Any) -> tuple[Tensor, Tensor]:
        log_scale, _ = _log_scale_and_shift(h, x)
        return AFFINE.undo(x, h), -log_scale.flatten(1).sum(1)

    def undo(self, y: Tensor, h: Any, out: Tensor | None = None) -> Tensor:
        log_scale, shift = _log_scale_and_shift(h, y)
        return torch.add(torch.mul(y, log_scale.exp(), out=out), shift, out=out)

    @property
    def inverse(self) -> Rule:
        return AFFINE


ADDITION, SUBTRACTION = Addition(), _Subtraction()
EXACT_ADDITION, EXACT_SUBTRACTION = _ExactAddition(), _ExactSubtraction()
EXACT: dict[type, Rule] = {Addition: EXACT_ADDITION, _Subtraction: EXACT_SUBTRACTION}
ADDITIVE = (*EXACT, *map(type, EXACT.values()))  # whose gradients are known; a subclass may have others
AFFINE, INVERSE_AFFINE = _Affine(), _InverseAffine()


def _check_branch_output(h: Any, x: Tensor) -> None:
    if not isinstance(h, Tensor):
        raise TypeError(f"a residual branch must return a tensor, got {type(h).__name__}")
    if h.shape != x.shape:
        raise ValueError(
            f"a residual branch must keep the shape of the half that it is added to: "
            f"it returned {tuple(h.shape)}, the half is {tuple(x.shape)}; "
            f"change the branch's output channels or stride, or split the state evenly"
        )
    if h.dtype != x.dtype and torch.promote_types(h.dtype, x.dtype) != x.dtype:
        raise TypeError(
            f"a residual branch must keep the dtype of the half that it is added to, or a narrower one: "
            f"it returned {h.dtype}, the half is {x.dtype}; convert the branch's output or the state"
        )


def _log_scale_and_shift(h: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    if not (isinstance(h, tuple) and len(h) == 2):
        raise TypeError(
            f"the branch of an affine coupling must return a tuple (log_scale, shift), got {type(h).__name__}; "
            f"for one tensor of twice the channels end the branch with `.chunk(2, dim=1)`"
        )
    for part in h:
        _check_branch_output(part, x)
    return h[0].to(x.dtype), h[1].to(x.dtype)  # exp(s) and exp(-s) in half precision are not each other's inverse


class Step(NamedTuple):
    """One elementary move: half `moved` of the state is moved by `rule` with the branch's value of the other half."""

    branch: nn.Module
    moved: int
    rule: Rule


class Coupling(nn.Module):
    """A layer made of elementary moves, each invertible given the half that it leaves alone.

    A subclass says what its moves are in `steps`; forward, inverse and log-determinant follow. All its parameters
    belong to branches.

    Attributes:
        exact: add on the fixed-point grid, so that the inverse is exact to the bit; set by the sequence that the layer
            stands in. Additive moves alone can be exact.

    Do not subclass it for a map that is no coupling: a layer with methods `forward`, `inverse` and,
    if its log-determinant is not 0, `forward_and_log_det` can stand in a sequence as it is.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet.reversible import Coupling, Step
        >>> from revnet.reversible.coupling import ADDITION
        >>> class Twice(Coupling):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.f, self.g = nn.Linear(3, 3), nn.Linear(3, 3)
        ...     def steps(self):  # x2 += f(x1), then x2 += g(x1)
        ...         return Step(self.f, 1, ADDITION), Step(self.g, 1, ADDITION)
        >>> coupling = Twice()
        >>> x1, x2 = coupling.inverse(*coupling(torch.zeros(2, 3), torch.ones(2, 3)))
        >>> bool(torch.allclose(x2, torch.ones(2, 3)))
        True
    """

    exact = False

    def steps(self) -> tuple[Step, ...]:
        """The elementary moves, in the order of the forward pass."""
        raise TypeError(f"{type(self).__name__} must define `steps`, the elementary moves that it is made of")

    def moves(self) -> tuple[Step, ...]:
        """The steps as they are taken: on the grid where `exact`."""
        steps = self.steps()
        if not self.exact:
            return steps
        if not self.is_additive():
            raise ValueError(
                f"exact=True: {type(self).__name__} multiplies the stream, and a product cannot be undone to the bit; "
                f"use additive couplings, or exact=False"
            )
        return tuple(Step(branch, moved, EXACT[type(rule)]) for branch, moved, rule in steps)

    def is_additive(self) -> bool:
        """Whether every step is an addition, or a subtraction."""
        return all(type(rule) in EXACT for _, _, rule in self.steps())

    def forward(self, x1: Tensor, x2: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        return self.forward_and_log_det(x1, x2, context)[0]

    def forward_and_log_det(
        self, x1: Tensor, x2: Tensor, context: Any = None
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """Output and log-determinant of shape (B,), or None where it is exactly 0."""
        state, log_det = [x1, x2], None
        for step in self.moves():
            h = self._evaluate(step, state[1 - step.moved], context)
            state[step.moved], term = step.rule.move(state[step.moved], h)
            if term is not None:
                log_det = term if log_det is None else log_det + term
        return (state[0], state[1]), log_det

    def inverse(self, y1: Tensor, y2: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """The input that `forward` maps to (y1, y2)."""
        state = [y1, y2]
        for branch, moved, rule in reversed(self.moves()):
            state[moved] = rule.undo(state[moved], call(branch, state[1 - moved], context))
        return state[0], state[1]

    def _evaluate(self, step: Step, x: Tensor, context: Any) -> Any:
        """The branch of a step at `x`; inside `recording` of this layer what a second evaluation needs is noted."""
        tape = tape_of(self)
        if tape is None:
            return call(step.branch, x, context)
        result, evaluation = observe(step.branch, (x,), lambda x: call(step.branch, x, context))
        tape.steps.append((step, evaluation.sampled(as_state(result, step.branch)) if tape.sampling else evaluation))
        return result


def _module(name: str, value: Any) -> nn.Module:
    if not isinstance(value, nn.Module):
        raise TypeError(
            f"{name} must be an nn.Module, so that its parameters are seen and get gradients; "
            f"got {type(value).__name__}; wrap it in a module"
        )
    return value


class AdditiveCoupling(Coupling):
    """y1 = x1 + branch(x2), y2 = x2; with `swap` the halves change roles. Its log-determinant is exactly 0.

    Source: Dinh, Krueger, Bengio 2014 (NICE), section 3.2.

    Args:
        branch: module from one half to a tensor of the shape of the other half; called `branch(x, context)` if the
            sequence is given a context. It must be deterministic up to torch's random generators.
        swap: move the second half by the first instead.

    Do not use it alone to mix all channels: alternate `swap`, or take `ReversibleBlock`.

    Example:
        >>> import torch
        >>> from revnet import AdditiveCoupling
        >>> layer = AdditiveCoupling(torch.nn.Linear(3, 3))
        >>> x1, x2 = torch.randn(2, 4, 3)
        >>> torch.allclose(layer.inverse(*layer(x1, x2))[0], x1, atol=1e-6)
        True
    """

    def __init__(self, branch: nn.Module, swap: bool = False) -> None:
        super().__init__()
        self.branch = _module("branch", branch)
        self.swap = swap

    def steps(self) -> tuple[Step, ...]:
        return (Step(self.branch, int(self.swap), ADDITION),)


class AffineCoupling(Coupling):
    """y1 = x1 * exp(s) + t with (s, t) = branch(x2), y2 = x2; log-determinant sum(s), of shape (B,).

    Source: Dinh, Sohl-Dickstein, Bengio 2016 (RealNVP), section 3.2.

    Args:
        branch: module from one half to a tuple (log_scale, shift), each of the shape of the other half. Bound the
            log-scale smoothly (a tanh, say): the inverse multiplies errors by exp(-s).
        swap: move the second half by the first instead.

    Example:
        >>> import torch
        >>> from revnet import AffineCoupling
        >>> class Branch(torch.nn.Linear):
        ...     def forward(self, x):
        ...         log_scale, shift = super().forward(x).chunk(2, dim=1)
        ...         return log_scale.tanh(), shift
        >>> layer = AffineCoupling(Branch(3, 6))
        >>> (y1, y2), log_det = layer.forward_and_log_det(torch.randn(4, 3), torch.randn(4, 3))
        >>> log_det.shape
        torch.Size([4])
    """

    def __init__(self, branch: nn.Module, swap: bool = False) -> None:
        super().__init__()
        self.branch = _module("branch", branch)
        self.swap = swap

    def steps(self) -> tuple[Step, ...]:
        return (Step(self.branch, int(self.swap), AFFINE),)


class ReversibleBlock(Coupling):
    """y1 = x1 + f(x2), y2 = x2 + g(y1): two additive couplings with the roles swapped.

    Source: Gomez, Ren, Urtasun, Grosse 2017 (The Reversible Residual Network), section 3.1.

    Args:
        f, g: residual branches, modules that keep the shape of a half; called `f(x, context)` if the sequence is given
            a context.

    Example:
        >>> import torch
        >>> from revnet import ReversibleBlock
        >>> block = ReversibleBlock(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        >>> y1, y2 = block(torch.randn(4, 3), torch.randn(4, 3))
    """

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f = _module("f", f)
        self.g = _module("g", g)

    def steps(self) -> tuple[Step, ...]:
        return (Step(self.f, 0, ADDITION), Step(self.g, 1, ADDITION))
