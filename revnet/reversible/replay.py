"""Second evaluations of a run, going backwards: what they reconstruct and the gradients that they give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from revnet.reversible.autocast import Autocast
from revnet.reversible.buffers import version_of
from revnet.reversible.coupling import ADDITIVE, Addition, Step
from revnet.reversible.evaluation import Evaluation, call, is_differentiable
from revnet.reversible.layer import apply_layer, as_stream, invert_layer
from revnet.reversible.run import ContextStructure, Run

__all__ = ["Replay"]


class Replay:
    """Second evaluations of a run and the gradients that they give, with grad mode off as in any backward pass."""

    def __init__(
        self,
        autocast: Autocast,
        run: Run,
        structure: ContextStructure,
        context: list[Tensor],
        grad_log_det: Tensor | None,
    ) -> None:
        self.autocast = autocast.to_restore()
        self.run = run
        self.grad_log_det = grad_log_det
        self.context_aliases = [c.detach().requires_grad_(c.requires_grad) for c in context]
        self.context = structure.rebuild(self.context_aliases)
        self.sums: dict[int, Tensor] = {}
        self.made = [False, False]
        """Which tensors of the state this pass has made itself: it may overwrite them if nothing else holds them."""

    def reverse_step(
        self,
        step: Step,
        evaluation: Evaluation,
        state: list[Tensor],
        grads: list[Tensor | None],
        needed: bool,
    ) -> None:
        """Undoes one elementary move: `state` and `grads`, those behind it, become those before it.

        One evaluation of the branch serves the reconstruction and the product.
        """
        moved, other = step.moved, 1 - step.moved
        grad = grads[moved]
        wanted = grad is not None or self.grad_log_det is not None
        additive = type(step.rule) in ADDITIVE
        with evaluation.aliased() as aliases:
            x = state[other].detach().requires_grad_(needed and is_differentiable(state[other]))
            with evaluation.surroundings(self.autocast):
                with torch.set_grad_enabled(wanted or evaluation.with_graph):
                    h = call(step.branch, x, self.context)
                self.run.check_repeated(step.branch, evaluation, h)
                out = state[moved] if self.made[moved] and _is_held_once(state[moved]) else None
                given = state[moved]
                version = version_of(given)
                state[moved] = step.rule.undo(given, h, out)
                if out is None and version_of(given) != version:
                    raise ValueError(
                        f"{type(step.rule).__name__} changes in place what its `undo` is given, which others hold; let "
                        f"it make a new tensor where `out` is None"
                    )
                self.made[moved] = True
                del given
                del out
                if not wanted:
                    return
                if additive:
                    assert isinstance(step.rule, Addition)
                    outputs, leaves = [(h, step.rule.gradient(grad))], [x]
                else:
                    before = state[moved].detach().requires_grad_()
                    with torch.enable_grad():
                        y, term = step.rule.move(before, h)
                    outputs, leaves = [(y, grad), (term, self.grad_log_det)], [before, x]
                    del y, term
                del h
            products = self._product(outputs, leaves, aliases)
        if not additive:
            grads[moved] = products[0]
        # In autograd's order: of two memory formats the sum takes the first one's.
        grads[other] = _sum(grads[other], products[-1])

    def reverse_rearrangement(
        self, layer: nn.Module, state: list[Tensor], grads: list[Tensor | None], needed: bool
    ) -> None:
        """Moves `state`, where it is still needed, and `grads` back to where they came from."""
        missing = [g is None for g in grads]
        if needed or any(missing):
            before = {_address(x) for x in state}
            state[:] = invert_layer(layer, tuple(state), self.context)
            self.made = [_address(x) not in before for x in state]
        if all(missing):
            grads[:] = [None] * len(state)
        elif any(missing):  # which inputs that reaches is for autograd to say
            leaves = [x.detach().requires_grad_(is_differentiable(x)) for x in state]
            with torch.enable_grad():
                output, _ = apply_layer(layer, tuple(x.view_as(x) for x in leaves), self.context)
            grads[:] = self._product([*zip(output, grads, strict=True)], leaves, {})
        else:
            grads[:] = invert_layer(layer, tuple(g for g in grads if g is not None), self.context)

    def reverse_layer(
        self,
        layer: nn.Module,
        evaluation: Evaluation,
        state: list[Tensor],
        grads: list[Tensor | None],
        needs: tuple[bool, ...] | None,
    ) -> None:
        """Reconstructs the input of a layer by its inverse, then differentiates the layer there."""
        with evaluation.aliased(), evaluation.surroundings(self.autocast):
            state[:] = as_stream(invert_layer(layer, tuple(state), self.context))
        self.made = [False] * len(state)  # the layer might hold what it returns
        with evaluation.aliased() as aliases:
            leaves = [
                x.detach().requires_grad_(is_differentiable(x) and (needs is None or needs[i]))
                for i, x in enumerate(state)
            ]
            with torch.enable_grad(), evaluation.surroundings(self.autocast):
                start = None if self.grad_log_det is None else torch.zeros_like(self.grad_log_det)
                # Views, because hooks on the inputs of a module (those of torch's counters) refuse leaves here.
                inputs = tuple(x.view_as(x) for x in leaves)
                output, log_det = apply_layer(layer, inputs, self.context, start)
                del inputs
            self.run.check_repeated(layer, evaluation, output)
            outputs = [*zip(output, grads, strict=True), (log_det, self.grad_log_det)]
            grads.clear()
            del output, log_det
            roots = _handed_over(outputs)
            del outputs
            grads.extend(self._product(roots, leaves, aliases))

    def _product(
        self,
        outputs: list[tuple[Any, Tensor | None]],
        leaves: list[Tensor],
        aliases: dict[int, Tensor],
    ) -> list[Tensor | None]:
        """The vector-Jacobian product. Gradients of parameters and context are summed up, those of leaves returned.

        Empties `outputs`: the graph alone holds what the product needs, so the outputs themselves can be freed.
        """
        edges, cotangents = [], []
        while outputs:
            output, cotangent = outputs.pop(0)
            if output is not None and output.requires_grad and cotangent is not None:
                edges.append(get_gradient_edge(output))
                cotangents.append(cotangent.to(output.dtype))
            del output, cotangent
        context = [(id(alias), alias) for alias in self.context_aliases]
        shared = [(key, alias) for key, alias in (*context, *aliases.items()) if alias.requires_grad]
        targets = [x for x in leaves if x.requires_grad] + [alias for _, alias in shared]
        # Every time: what a branch uses, and what of it requires grad, may change from step to step.
        _check_nothing_hidden([edge.node for edge in edges], targets)
        if not edges or not targets:
            return [None] * len(leaves)
        found = list(torch.autograd.grad(edges, targets, cotangents, allow_unused=True))
        products = [found.pop(0) if x.requires_grad else None for x in leaves]
        for (key, _), gradient in zip(shared, found, strict=True):
            if gradient is not None:
                known = self.sums.get(key)
                self.sums[key] = _alone(gradient) if known is None else _plus(gradient, known)
        for key, alias in shared:  # what a backward pass inside of a Function of the branch's own has left there
            if alias.grad is not None:
                known = self.sums.get(key)
                self.sums[key] = alias.grad if known is None else _plus(known, alias.grad)
                alias.grad = None
        return products


def _handed_over(outputs: list[tuple[Any, Tensor | None]]) -> list[tuple[Any, Tensor | None]]:
    """One root in place of the outputs that have gradients, which nobody holds any longer once they have been used.

    `torch.autograd.grad` itself holds the gradients that it is given to the end.
    """
    roots: list[tuple[Any, Tensor | None]] = [(output, None) for output, gradient in outputs if gradient is None]
    given = [(output, g) for output, g in outputs if g is not None and output is not None and output.requires_grad]
    if given:
        found, gradients = map(list, zip(*given, strict=True))
        with torch.enable_grad():
            root = _Handover.apply(gradients, *found)
        roots.append((root, torch.empty_like(root)))
    return roots


class _Handover(torch.autograd.Function):
    """An empty tensor whose backward pass hands over the gradients of the outputs, and forgets them."""

    @staticmethod
    def forward(ctx: Any, cotangents: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.cotangents = cotangents
        ctx.dtypes = [output.dtype for output in outputs]
        return outputs[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        cotangents = [None] + [c.to(dtype) for c, dtype in zip(ctx.cotangents, ctx.dtypes, strict=True)]
        ctx.cotangents.clear()
        return tuple(cotangents)


def _address(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _holders(x: Tensor) -> int:
    return torch._C._storage_Use_Count(_address(x))


_ONE_HOLDER = _holders(torch.empty(1))


def _is_held_once(x: Tensor) -> bool:
    """Whether no other tensor (in a graph, or taken by a hook) shares the memory of `x`, as far as can be told."""
    if torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_legacy_batchedtensor(x):
        return False  # it does not tell
    return _holders(x) <= _ONE_HOLDER


def _check_nothing_hidden(nodes: list[Any], targets: list[Tensor]) -> None:
    """Finds tensors that a branch uses without holding them as parameters: their gradient would be lost."""
    known, seen = {id(t) for t in targets}, set(nodes)
    for node in nodes:
        following = node.next_functions
        for after, _ in following:
            if after is not None and after not in seen:
                seen.add(after)
                nodes.append(after)
        # A node that accumulates the gradient of a leaf has none behind it; custom functions may keep a `variable` too.
        hidden = None if following else getattr(node, "variable", None)
        if hidden is not None and id(hidden) not in known:
            raise TypeError(
                f"a branch of a reversible sequence uses a tensor of shape {tuple(hidden.shape)} that requires grad "
                f"and is none of its parameters: it would get no gradient. Register it, or the module that holds it "
                f"(in an nn.ModuleList instead of a list), or pass it as context"
            )


def _alone(gradient: Tensor) -> Tensor:
    """The gradient in memory of its own: a leaf takes over as its .grad what it is given, and two must not share it."""
    if gradient.layout is not torch.strided or _is_held_once(gradient):
        return gradient
    return gradient.clone()


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The sum, always a new tensor where both are given: gradients may share storage with one another."""
    if first is None or second is None:
        return first if second is None else second
    return _plus(first, second)


def _plus(first: Tensor, second: Tensor) -> Tensor:
    """The sum of two gradients, of which one may be sparse."""
    return second + first if first.is_sparse and not second.is_sparse else first + second
