"""First and second evaluation of a module: the second repeats the first and changes nothing outside."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils import _pytree as pytree

from revnet.reversible.autocast import Autocast
from revnet.reversible.buffers import (
    STATISTICS,
    Changed,
    Unchanged,
    can_go_untracked,
    copy_buffers,
    copy_of,
    sort_out,
    version_of,
)
from revnet.reversible.drift import Sample
from revnet.reversible.generators import random_replayed, random_states
from revnet.reversible.layer import State
from revnet.reversible.modules import modules_in, parameters_of
from revnet.reversible.names import COMPILED, names_in
from revnet.reversible.tape import suspended

__all__ = ["Evaluation", "call", "is_differentiable", "is_recomputing", "observe"]

T = TypeVar("T")
ParameterPlace = tuple[nn.Module, str, Tensor, bool]
_CHANGES_INPUT = (
    "{} changes its input in place, and its input is part of the state that others still read; begin it with an "
    "operation that does not (inplace=False)"
)
GRAD_MODE = ("is_grad_enabled", COMPILED)
"""Names in the code of a branch that may do something else where it need give no gradients."""
_inspected: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Branches that were seen to leave their input alone under inference_mode."""


class _Local(threading.local):
    """Per thread, because backward passes on an accelerator run in a thread of their own."""

    recomputing = False


_local = _Local()


def is_recomputing() -> bool:
    """Whether the code that asks is being run a second time, inside a backward pass.

    Forward hooks and side effects of a branch run once per evaluation: twice per training step under `reconstruct`, and
    under `recompute` as far as the second evaluation goes, which ends where nothing is left to save. A hook that must
    count once asks this function.

    Example:
        >>> from revnet import is_recomputing
        >>> is_recomputing()
        False
    """
    return _local.recomputing


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What it takes to evaluate a branch or layer a second time exactly as the first.

    Attributes:
        owners: the modules of the branch or layer that hold parameters or buffers.
        modes: every module of it, with whether it was in training mode.
        parameters: every place that held a parameter, or a buffer that requires grad, with the tensor it held at the
            time (under `torch.func.functional_call` that is not the one the module holds later), and whether that one
            required grad then.
        buffers: values before the first evaluation of the buffers that it changed and that its result may depend on.
        unchanged: the other buffers, and how often they had been changed in place.
        random: states of the random generators before it; whether it drew cannot be told from those behind it, which
            the branch may have set back.
        device: where it ran.
        with_graph: whether the first evaluation had a graph, so that the second must have one too.
        reads_statistics: whether running statistics may enter its result by another way than their normalisation.
        sample: a few values of its result, to compare with the second one's; None if they are not to be compared.
    """

    owners: tuple[nn.Module, ...]
    modes: tuple[tuple[nn.Module, bool], ...]
    parameters: tuple[ParameterPlace, ...]
    buffers: Changed
    unchanged: Unchanged
    random: tuple[Tensor, ...]
    device: torch.device
    with_graph: bool
    reads_statistics: bool
    sample: Sample | None = None

    def sampled(self, result: State) -> Evaluation:
        """The same with a sample of its result."""
        return replace(self, sample=Sample(result, exact=False))

    @contextmanager
    def aliased(self) -> Iterator[dict[int, Tensor]]:
        """Lets aliases stand in for the parameters and scratch copies for the buffers; yields the aliases by `id`.

        Aliases, because a product taken with respect to the parameters themselves would set off their hooks, and
        scratch copies, because the second evaluation must not count in the running statistics.
        """
        for owner, name, buffer, version in self.unchanged:
            if version_of(buffer) != version:
                raise RuntimeError(
                    f"buffer {name!r} of {type(owner).__name__} in a reversible sequence was changed in place between "
                    f"the forward and the backward pass; change it after the backward pass, or keep the activations "
                    f'(activations="store")'
                )
        aliases: dict[int, Tensor] = {}
        restore: list[tuple[dict[str, Any], str, Any]] = []
        switched = [(module, training) for module, training in self.modes if module.training != training]
        was_recomputing = _local.recomputing
        _local.recomputing = True
        try:
            for module, training in switched:
                module.training = training
            for owner, name, parameter, needs_grad in self.parameters:
                if id(parameter) not in aliases:
                    aliases[id(parameter)] = _alias(parameter, needs_grad)
                table: dict[str, Any] = owner._parameters if name in owner._parameters else owner._buffers
                if name not in table:
                    raise RuntimeError(
                        f"parameter {name!r} of {type(owner).__name__} in a reversible sequence was removed between "
                        f"the forward and the backward pass; remove it after the backward pass"
                    )
                restore.append((table, name, table[name]))
                table[name] = aliases[id(parameter)]
            for owner in self.owners:
                if isinstance(owner, nn.RNNBase):
                    for name, own in _lists_of_weights(owner, aliases).items():
                        restore.append((owner.__dict__, name, owner.__dict__[name]))
                        owner.__dict__[name] = own
            replaced = {id(alias) for alias in aliases.values()}
            # Of a buffer that something else replaced since, or functional_call for its duration, the one of that time.
            earlier = {(id(owner), name): value for owner, name, value, _ in self.unchanged}
            earlier |= {(id(owner), name): value for owner, name, value in self.buffers}
            copies: dict[int, Tensor] = {}  # a buffer that was in several places stays one
            for owner in self.owners:
                # Told not to, a normalisation leaves its statistics alone, which takes fewer operations than copies of
                # them; it then saves fewer tensors than in a first evaluation with a graph, and compiled code would be
                # compiled again.
                untracked = can_go_untracked(owner) and not self.with_graph and not self.reads_statistics
                if untracked:
                    restore.append((owner.__dict__, "track_running_stats", owner.track_running_stats))
                    owner.__dict__["track_running_stats"] = False
                for name, value in owner._buffers.items():
                    if untracked and name in STATISTICS:
                        if isinstance(owner, _InstanceNorm):  # which writes them all the same if there are any
                            restore.append((owner._buffers, name, value))
                            owner._buffers[name] = None
                        continue
                    then = earlier.get((id(owner), name), value)
                    if value is then is None or id(value) in replaced:
                        continue
                    restore.append((owner._buffers, name, value))
                    if then is not None and id(then) not in copies:
                        copies[id(then)] = copy_of(then)
                    owner._buffers[name] = None if then is None else copies[id(then)]
            yield aliases
        finally:
            for table, name, value in reversed(restore):
                table[name] = value
            for module, training in switched:
                module.training = not training
            _local.recomputing = was_recomputing

    def surroundings(self, autocast: Autocast | None) -> AbstractContextManager[None]:
        """Random generators and autocast as they were during the first evaluation; None: autocast is as it was."""
        surrounded = nullcontext() if autocast is None else autocast.restored()
        return random_replayed(self.random, self.device, surrounded)


def _lists_of_weights(module: nn.RNNBase, aliases: dict[int, Tensor]) -> dict[str, list[Any]]:
    """Those that a recurrent layer keeps: finding them out of date, on CUDA it moves its weights to other memory."""
    weights = [aliases.get(id(weight), weight) for weight in module._flat_weights]
    references = [None if weight is None else weakref.ref(weight) for weight in weights]
    return {"_flat_weights": weights, "_flat_weight_refs": references}


def _alias(parameter: Tensor, needs_grad: bool) -> Tensor:
    """A leaf in the place of `parameter`, with its attributes; one that requires no grad has no hooks to set off."""
    if not (needs_grad or parameter.requires_grad):
        return parameter
    # A tensor that needs a gradient without being a leaf comes from functional_call: any alias serves.
    kind = type(parameter)
    if kind is not nn.Parameter and isinstance(parameter, nn.Parameter) and type(parameter.detach()) is Tensor:
        alias = Tensor._make_subclass(kind, parameter.detach(), needs_grad)
    else:
        alias = nn.Parameter(parameter, needs_grad)  # which detaches it
    if parameter.__dict__:
        alias.__dict__.update(parameter.__dict__)
    return alias


def observe(
    module: nn.Module, state: State, compute: Callable[..., T], begins: Callable[[Evaluation], None] | None = None
) -> tuple[T, Evaluation]:
    """Runs `compute(*state)`, the first evaluation of `module`, and notes what a second one needs.

    `begins` is told at its beginning what a second one would need while the first is not over.
    """
    device = state[0].device
    modules = modules_in(module)
    modes = tuple([(m, m.training) for m in modules])
    owners = tuple([m for m in modules if m._parameters or m._buffers])
    with suspended():
        random = random_states(device)
        named = set().union(*map(names_in, modules))
        reads_statistics = not named.isdisjoint(STATISTICS)
        buffers = copy_buffers(owners, reads_statistics)
        has_graph = torch.is_grad_enabled()
        with_graph = has_graph or not named.isdisjoint(GRAD_MODE) or any(map(_depends_on_grad_mode, modules))
        versions = [version_of(x) for x in state]
        # The evaluation may put something else in the place of one, its result say.
        held = [(m, n, b, True) for m in owners for n, b in m._buffers.items() if b is not None and b.requires_grad]
        held_versions = [version_of(buffer) for _, _, buffer, _ in held]
        if begins is not None:
            copies = tuple((owner, name, copy) for owner, name, _, copy, _ in buffers)
            begins(Evaluation(owners, modes, _places(owners), copies, (), random, device, with_graph, reads_statistics))
        result = _as_second(compute, state) if with_graph and not has_graph else compute(*state)
    if [version_of(x) for x in state] != versions:
        raise ValueError(_CHANGES_INPUT.format(type(module).__name__))
    for (owner, name, buffer, _), version in zip(held, held_versions, strict=True):
        if version_of(buffer) != version:
            raise ValueError(
                f"{type(owner).__name__} changes its buffer {name!r}, which requires grad, in place, and a second "
                f"evaluation would find it changed; let it put a new tensor there, or detach the buffer"
            )
    changed, unchanged = sort_out(buffers, reads_statistics)
    # A leaf that has come to require grad is told of where its gradient turns up; anything else there is a result.
    places = {(id(m), n): (m, n, p, g) for m, n, p, g in _places(owners) if n in m._parameters or p.is_leaf}
    places |= {(id(place[0]), place[1]): place for place in held}
    return result, Evaluation(
        owners, modes, tuple(places.values()), changed, unchanged, random, device, with_graph, reads_statistics
    )


def _places(owners: Iterable[nn.Module]) -> tuple[ParameterPlace, ...]:
    return tuple([(m, n, p, p.requires_grad) for m in owners for n, p in parameters_of(m)])


def _depends_on_grad_mode(module: nn.Module) -> bool:
    """Whether a module may compute other last bits where it need give no gradients.

    Compiled code does (by `module.compile()` or `torch.compile(module)`), torch's LSTM on a CPU, and its transformer
    layers in eval mode.
    """
    if isinstance(module, nn.LSTM):
        return True
    if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
        return True
    return not module.training and isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer)


def _as_second(compute: Callable[..., T], state: State) -> T:
    """`compute(*state)` with a graph, as the second evaluation will have; it is dropped."""
    leaves = [x.detach().requires_grad_(is_differentiable(x)) for x in state]
    with torch.enable_grad():
        return pytree.tree_map_only(Tensor, Tensor.detach, compute(*leaves))


def is_differentiable(x: Tensor) -> bool:
    """Whether a gradient of `x` exists."""
    return x.is_floating_point() or x.is_complex()


def call(module: nn.Module, x: Tensor, context: Any = None) -> Any:
    """`module(x)`, or `module(x, context)` where there is a context.

    It sees a view of x: what its uses of x send back is then summed before it meets the rest of the stream's gradient,
    in every mode in the same order.
    """
    x = x.view_as(x)
    # Under inference_mode tensors do not count their changes: once for each branch, values are compared.
    unseen = not torch.compiler.is_compiling() and _is_real(x) and x.is_inference() and module not in _inspected
    version, before = version_of(x), x.clone() if unseen else None
    if context is None:
        result = module(x)
    else:  # of a sequence the second argument is the other half
        result = module(x, context=context) if hasattr(type(module), "has_inverse") else module(x, context)
    if version_of(x) != version or (before is not None and not ((before == x) | (before != before)).all()):
        raise ValueError(_CHANGES_INPUT.format(type(module).__name__))
    if before is not None:
        _inspected.add(module)
    return result


def _is_real(x: Tensor) -> bool:
    """Whether a tensor has values that can be looked at."""
    return type(x) is Tensor and x.device.type != "meta"
