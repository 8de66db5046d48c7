"""The reversible backward pass: one autograd Function for a run of layers that keep no activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from revnet.reversible.coupling import Addition, Coupling, Step
from revnet.reversible.drift import Sample
from revnet.reversible.evaluation import Autocast, Evaluation, call, observe, recording
from revnet.reversible.halves import Merge, Split
from revnet.reversible.layer import State, apply_layer, as_state, invert_layer

__all__ = ["Run", "apply_run"]

# Newer versions of torch hand the gradients over in a list that the backward pass may empty as it goes.
_BOXED = hasattr(torch.autograd.Function, "boxed_grads_call")
_TENSOR = object()


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive layers of a sequence that share one Function.

    Attributes:
        layers: the layers in forward order.
        first: number of the first of them in its sequence.
        reconstruct: for each layer, whether its input is reconstructed from its output (True) or kept (False).
        exact: whether the stream is on the fixed-point grid.
        tolerance: relative difference from which a branch's two evaluations are called different; None: not compared.
        report: receives the reconstruction error of every backward pass over the run.
        inspected: the runs of the sequence, by their first layer, whose branches were found to hide no tensors.
    """

    layers: tuple[nn.Module, ...]
    first: int
    reconstruct: tuple[bool, ...]
    exact: bool
    tolerance: float | None
    report: Callable[[Tensor], None]
    inspected: set[int]

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, each once."""
        unique = {id(p): p for layer in self.layers for p in layer.parameters()}
        if any(type(p) not in (nn.Parameter, Tensor) for p in unique.values()):
            _check_unsharded(self)
        return [p for p in unique.values() if p.requires_grad]

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules with their names in the sequence."""
        for index, layer in enumerate(self.layers, self.first):
            yield from layer.named_modules(prefix=str(index))


@dataclass(frozen=True, slots=True)
class _Trace:
    """What the forward pass notes of one layer. Tensors of the state are not in here but saved with autograd."""

    kept: int
    """How many tensors of the layer's input were saved, 0 if it is reconstructed."""
    evaluations: tuple[Evaluation, ...]
    sample: Sample | None
    """A sample of the input where a stretch of reconstructed layers begins."""


class _Context:
    """The structure of the branches' extra inputs: any nesting of tuples, lists and dicts that holds tensors."""

    def __init__(self, context: Any) -> None:
        leaves, self.spec = pytree.tree_flatten(context)
        self.constants = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.count = sum(constant is _TENSOR for constant in self.constants)

    @staticmethod
    def tensors(context: Any) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves(context) if isinstance(leaf, Tensor)]

    def rebuild(self, tensors: list[Tensor]) -> Any:
        rest = iter(tensors)
        leaves = [next(rest) if constant is _TENSOR else constant for constant in self.constants]
        return pytree.tree_unflatten(leaves, self.spec)


def apply_run(run: Run, state: State, context: Any, log_det: Tensor | None) -> tuple[State, Tensor | None]:
    """The output of the run's layers, and `log_det` plus their log-determinants if it is not None."""
    structure = _Context(context)
    inputs = [*state, *([] if log_det is None else [log_det])]
    parameters = run.parameters()
    job = _Job(run, len(state), log_det is not None, structure, parameters)
    outputs = _ReversibleFunction.apply(job, *inputs, *structure.tensors(context), *parameters)
    return (outputs, None) if log_det is None else (outputs[:-1], outputs[-1])


@dataclass(slots=True)
class _Job:
    """How the flat list of tensors that autograd sees is made up."""

    run: Run
    states: int
    has_log_det: bool
    context: _Context
    parameters: list[nn.Parameter]

    def unpack(self, tensors: tuple[Tensor, ...]) -> tuple[State, Tensor | None, list[Tensor]]:
        state, rest = tensors[: self.states], list(tensors[self.states :])
        log_det = rest.pop(0) if self.has_log_det else None
        return state, log_det, rest[: self.context.count]


class _ReversibleFunction(torch.autograd.Function):
    boxed_grads_call = True

    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor) -> tuple[Tensor, ...]:
        state, log_det, context_tensors = job.unpack(tensors)
        # To module hooks (those of torch's own counters) a tensor that requires grad must have a gradient function.
        state = tuple(x.detach() for x in state)
        context_tensors = [c.detach() for c in context_tensors]
        context = job.context.rebuild(context_tensors)
        ctx.autocast = Autocast.current(state[0].device)
        ctx.set_materialize_grads(False)
        saved: list[Tensor] = []
        traces: list[_Trace] = []
        follows_known = True
        pairs = zip(job.run.layers, job.run.reconstruct, strict=True)
        watched = any(reconstruct and not isinstance(layer, Split | Merge) for layer, reconstruct in pairs)
        for layer, reconstruct in zip(job.run.layers, job.run.reconstruct, strict=True):
            begins = Sample(state, job.run.exact) if watched and reconstruct and follows_known else None
            if not reconstruct:
                saved.extend(state)
            kept = 0 if reconstruct else len(state)
            if reconstruct and isinstance(layer, Coupling):
                with recording(job.run.tolerance is not None) as evaluations:
                    state, log_det = apply_layer(layer, state, context, log_det, job.run.exact)
                _check_all_in_branches(layer, evaluations)
            else:
                state, log_det, evaluation = _observed(job.run, layer, state, context, log_det)
                evaluations = [evaluation]
            traces.append(_Trace(kept, tuple(evaluations), begins))
            follows_known = not reconstruct
        if job.run.reconstruct[-1]:
            saved.extend(state)
        ctx.job, ctx.traces = job, traces
        ctx.versions = [(p, p._version) for layer in job.run.layers for p in layer.parameters()]
        # The traces hold the parameters: saving them here too would let saved-tensor hooks move them about.
        ctx.save_for_backward(*saved, *job.unpack(tensors)[2])
        return state if log_det is None else (*state, log_det)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = grad_outputs[0] if _BOXED else list(grad_outputs)
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a sequence that recomputes or reconstructs its activations cannot be differentiated twice "
                '(create_graph=True); switch it to activations="store", where that works'
            )
        job: _Job = ctx.job
        _check_unchanged(job.run, ctx.versions)
        for layer in job.run.layers:
            if isinstance(layer, Coupling):
                layer.exact = job.run.exact  # it may have been switched since
        saved = list(ctx.saved_tensors)
        if hasattr(ctx, "maybe_clear_saved_tensors"):
            ctx.maybe_clear_saved_tensors()
        context = [saved.pop() for _ in range(job.context.count)][::-1]
        grad_log_det = grads.pop() if job.has_log_det else None
        needs = ctx.needs_input_grad[1 : 1 + job.states]
        replay = _Replay(ctx.autocast, job.run, job.context, context, grad_log_det)
        kept = sum(trace.kept for trace in ctx.traces)
        state = saved[kept:]
        del saved[kept:]
        errors = []
        for index in reversed(range(len(job.run.layers))):
            layer, trace = job.run.layers[index], ctx.traces[index]
            wanted = needs if index == 0 else None
            if trace.kept:
                state = saved[-trace.kept :]
                del saved[-trace.kept :]
                replay.differentiate(layer, trace.evaluations[0], state, grads, wanted)
            elif isinstance(layer, Coupling):
                steps = list(zip(layer.moves(), trace.evaluations, strict=True))
                while steps:
                    step, evaluation = steps.pop()
                    needed = wanted is None or bool(steps) or wanted[1 - step.moved]
                    replay.reverse_step(step, evaluation, state, grads, needed)
            else:
                replay.reverse_layer(layer, trace.evaluations[0], state, grads, wanted)
            if trace.sample is not None:
                errors.append(trace.sample.error(tuple(state)))
        if errors:
            job.run.report(torch.stack(errors).amax())
        job.run.inspected.add(job.run.first)
        flat: list[Tensor | None] = [g if need else None for g, need in zip(grads, needs, strict=True)]
        flat += [grad_log_det] * job.has_log_det
        flat += [replay.sums.get(id(t)) for t in (*replay.context_aliases, *job.parameters)]
        return (None, *flat)


def _observed(
    run: Run, layer: nn.Module, state: State, context: Any, log_det: Tensor | None
) -> tuple[State, Tensor | None, Evaluation]:
    (output, log_det), evaluation = observe(
        layer, state[0].device, lambda: apply_layer(layer, state, context, log_det, run.exact)
    )
    return output, log_det, evaluation if run.tolerance is None else evaluation.sampled(output)


def _check_unsharded(run: Run) -> None:
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    for name, module in run.named_modules():
        if isinstance(module, FSDPModule):
            raise ValueError(
                f"{name} of a reversible sequence was given to fully_shard, whose hooks do not reach the second "
                f"evaluation of a branch; give it the whole sequence or the network instead, or keep the activations "
                f'of that layer (activations="store")'
            )


def _check_all_in_branches(layer: Coupling, evaluations: list[Evaluation]) -> None:
    covered = {id(p) for e in evaluations for _, _, p in e.parameters}
    for name, parameter in layer.named_parameters():
        if id(parameter) not in covered:
            raise TypeError(
                f"parameter {name!r} of {type(layer).__name__} belongs to no branch of its `steps`, so it would get no "
                f"gradient; move it into a branch"
            )


def _check_unchanged(run: Run, versions: list[tuple[Tensor, int]]) -> None:
    for parameter, version in versions:
        if parameter._version != version:
            named = [
                name
                for index, layer in enumerate(run.layers, run.first)
                for name, p in layer.named_parameters(str(index))
                if p is parameter
            ]
            raise RuntimeError(
                f"parameter {', '.join(named)} of a reversible sequence was changed in place between the forward and "
                f"the backward pass; change it after the backward pass (the optimizer's step too)"
            )


class _Replay:
    """Second evaluations of a run and the gradients that they give."""

    def __init__(
        self,
        autocast: Autocast,
        run: Run,
        structure: _Context,
        context: list[Tensor],
        grad_log_det: Tensor | None,
    ) -> None:
        self.autocast = autocast
        self.run = run
        self.grad_log_det = grad_log_det
        self.context_aliases = [c.detach().requires_grad_(c.requires_grad) for c in context]
        self.context = structure.rebuild(self.context_aliases)
        self.sums: dict[int, Tensor] = {}

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
        with evaluation.aliased() as aliases:
            x = state[other].detach().requires_grad_(needed and _is_differentiable(state[other]))
            with torch.set_grad_enabled(wanted), evaluation.surroundings(self.autocast):
                h = call(step.branch, x, self.context)
            self._compare(step.branch, evaluation, as_state(h, step.branch))
            with torch.no_grad():
                state[moved] = step.rule.undo(state[moved], h)
            if not wanted:
                return
            if isinstance(step.rule, Addition):
                outputs, leaves = [(h, grad)], [x]
            else:
                before = state[moved].detach().requires_grad_()
                with torch.enable_grad():
                    y, term = step.rule.move(before, h)
                outputs, leaves = [(y, grad), (term, self.grad_log_det)], [before, x]
                del y, term
            del h
            products = self._product(outputs, leaves, aliases)
        if not isinstance(step.rule, Addition):
            grads[moved] = products[0]
        grads[other] = _sum(products[-1], grads[other])

    def reverse_layer(
        self,
        layer: nn.Module,
        evaluation: Evaluation,
        state: list[Tensor],
        grads: list[Tensor | None],
        needs: tuple[bool, ...] | None,
    ) -> None:
        """Reconstructs the input of a layer by its inverse, then differentiates the layer there."""
        with torch.no_grad(), evaluation.aliased(), evaluation.surroundings(self.autocast):
            state[:] = invert_layer(layer, tuple(state), self.context)
        self.differentiate(layer, evaluation, state, grads, needs)

    def differentiate(
        self,
        layer: nn.Module,
        evaluation: Evaluation,
        state: list[Tensor],
        grads: list[Tensor | None],
        needs: tuple[bool, ...] | None,
    ) -> None:
        """Replaces `grads`, those of the layer's output, by those of its input `state`."""
        with evaluation.aliased() as aliases:
            leaves = [
                x.detach().requires_grad_(_is_differentiable(x) and (needs is None or needs[i]))
                for i, x in enumerate(state)
            ]
            with torch.enable_grad(), evaluation.surroundings(self.autocast):
                start = None if self.grad_log_det is None else torch.zeros_like(self.grad_log_det)
                output, log_det = apply_layer(layer, tuple(leaves), self.context, start, self.run.exact)
            self._compare(layer, evaluation, output)
            outputs = [*zip(output, grads, strict=True), (log_det, self.grad_log_det)]
            del output, log_det
            grads.clear()
            grads.extend(self._product(outputs, leaves, aliases))

    def _compare(self, module: nn.Module, evaluation: Evaluation, result: State) -> None:
        if evaluation.sample is None or self.run.tolerance is None:
            return
        difference = evaluation.sample.error(result).item()
        if difference > self.run.tolerance:
            name = next(name for name, found in self.run.named_modules() if found is module)
            raise RuntimeError(
                f"{name} ({type(module).__name__}) of a reversible sequence is not deterministic: the result of its "
                f"second evaluation is {difference:.1e} off that of the first (relative); let it draw from torch's "
                f'default generators and keep its state in buffers, or keep its activations (activations="store")'
            )

    def _product(
        self, outputs: list[tuple[Any, Tensor | None]], leaves: list[Tensor], aliases: dict[int, Tensor]
    ) -> list[Tensor | None]:
        """The vector-Jacobian product. Gradients of parameters and context are summed up, those of leaves returned.

        Empties `outputs`: the graph alone holds what the product needs, so the outputs themselves can be freed.
        """
        edges, cotangents = [], []
        while outputs:
            output, cotangent = outputs.pop(0)
            if output is not None and cotangent is not None and output.requires_grad:
                edges.append(get_gradient_edge(output))
                cotangents.append(cotangent.to(output.dtype))
            del output, cotangent
        context = [(id(alias), alias) for alias in self.context_aliases]
        shared = [(key, alias) for key, alias in (*context, *aliases.items()) if alias.requires_grad]
        targets = [x for x in leaves if x.requires_grad] + [alias for _, alias in shared]
        if not edges or not targets:
            return [None] * len(leaves)
        if self.run.first not in self.run.inspected:
            _check_nothing_hidden([edge.node for edge in edges], targets)
        found = list(torch.autograd.grad(edges, targets, cotangents, allow_unused=True))
        products = [found.pop(0) if x.requires_grad else None for x in leaves]
        for (key, _), gradient in zip(shared, found, strict=True):
            if gradient is not None:
                total = _sum(gradient, self.sums.get(key))
                assert total is not None
                self.sums[key] = total
        return products


def _check_nothing_hidden(nodes: list[Any], targets: list[Tensor]) -> None:
    """Finds tensors that a branch uses without holding them as parameters: their gradient would be lost."""
    known, seen = {id(t) for t in targets}, set(nodes)
    while nodes:
        node = nodes.pop()
        hidden = getattr(node, "variable", None)  # of a node that accumulates the gradient of a leaf
        if hidden is not None and id(hidden) not in known:
            raise TypeError(
                f"a branch of a reversible sequence uses a tensor of shape {tuple(hidden.shape)} that requires grad "
                f"and is none of its parameters: it would get no gradient. Register it, or the module that holds it "
                f"(in an nn.ModuleList instead of a list), or pass it as context"
            )
        nodes += [n for n, _ in node.next_functions if n is not None and n not in seen]
        seen.update(nodes)


def _is_differentiable(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The sum, always a new tensor where both are given: gradients may share storage with one another."""
    if first is None or second is None:
        return first if second is None else second
    return first + second
