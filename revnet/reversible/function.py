"""The reversible backward pass: one autograd Function for a run of layers that are reconstructed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from revnet.reversible.autocast import Autocast
from revnet.reversible.coupling import Coupling, Step
from revnet.reversible.drift import Sample
from revnet.reversible.evaluation import Evaluation, observe
from revnet.reversible.halves import Rearrangement
from revnet.reversible.layer import State, apply_layer, on_grid
from revnet.reversible.modules import modules_in, parameters_of
from revnet.reversible.replay import Replay
from revnet.reversible.run import ContextStructure, Run
from revnet.reversible.tape import recording

__all__ = ["reconstructed"]

# Newer versions of torch hand the gradients over in a list that the backward pass may empty as it goes.
_BOXED = hasattr(torch.autograd.Function, "boxed_grads_call")


def reconstructed(run: Run, state: State, context: Any, log_det: Tensor | None) -> tuple[State, Tensor | None]:
    """The output of the run's layers, and `log_det` plus their log-determinants if it is not None."""
    structure = ContextStructure(context)
    inputs = [*state, *([] if log_det is None else [log_det])]
    parameters = run.parameters()
    trainable = [p for p in parameters if p.requires_grad]
    job = _Job(run, len(state), log_det is not None, structure, parameters, trainable)
    outputs = _ReversibleFunction.apply(job, *inputs, *structure.tensors(context), *trainable)
    return (outputs, None) if log_det is None else (outputs[:-1], outputs[-1])


@dataclass(slots=True)
class _Job:
    """How the flat list of tensors that autograd sees is made up."""

    run: Run
    states: int
    has_log_det: bool
    context: ContextStructure
    parameters: list[Tensor]
    trainable: list[Tensor]

    def unpack(self, tensors: tuple[Tensor, ...]) -> tuple[State, Tensor | None, list[Tensor]]:
        state, rest = tensors[: self.states], list(tensors[self.states :])
        log_det = rest.pop(0) if self.has_log_det else None
        return state, log_det, rest[: self.context.count]


class _ReversibleFunction(torch.autograd.Function):
    boxed_grads_call = True

    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor) -> tuple[Tensor, ...]:
        state, log_det, context_tensors = job.unpack(tensors)
        given = log_det
        # To module hooks (those of torch's own counters) a tensor that requires grad must have a gradient function.
        state = tuple(x.detach() for x in state)
        if job.run.enters_grid:  # here, and not before, so that the rounded copy goes as soon as it has been split
            state = on_grid(state)
        context_tensors = [c.detach().requires_grad_(c.requires_grad) for c in context_tensors]
        context_versions = [c._version for c in context_tensors]
        context = job.context.rebuild(context_tensors)
        ctx.autocast = Autocast.current(state[0].device)
        ctx.set_materialize_grads(False)
        # For each layer its steps with the evaluations of their branches, or its own evaluation, or None.
        ctx.evaluations = []
        ctx.begins, ctx.sample = len(job.run.layers), None
        for index, layer in enumerate(job.run.layers):
            moves_only = _moves_only(layer)
            if ctx.sample is None and not moves_only:
                ctx.begins, ctx.sample = index, Sample(state, job.run.exact)
            evaluated: list[tuple[Step, Evaluation]] | Evaluation | None = None
            if moves_only:
                state, log_det = apply_layer(layer, state, context, log_det, job.run.exact)
            elif isinstance(layer, Coupling):
                _check_hooks(layer)
                with (
                    recording(layer, job.run.tolerance is not None) as evaluated,
                    _unchanged_by_hooks(layer, state, context),
                ):
                    state, log_det = apply_layer(layer, state, context, log_det, job.run.exact)
                if layer not in job.run.inspected:
                    _check_all_in_branches(layer, [evaluation for _, evaluation in evaluated])
                    job.run.inspected.add(layer)
            else:
                state, log_det, evaluated = _observed(job.run, layer, state, context, log_det)
                state = tuple(x.detach() for x in state)  # from a graph that the layer may have built on its own
            ctx.evaluations.append(evaluated)
        job.context.check_unchanged(context, context_tensors, context_versions)
        ctx.job = job
        # After the pass, because it may write to parameters (an embedding with max_norm does).
        ctx.versions = [(p, p._version) for p in job.parameters]
        # The evaluations hold the parameters: saving them here too would let saved-tensor hooks move them about.
        ctx.save_for_backward(*state, *job.unpack(tensors)[2])
        if log_det is None:
            return state
        # What is given and returned would be a view to autograd, which nobody may add to in place.
        return *state, log_det.clone() if log_det is given else log_det

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        if torch.is_inference_mode_enabled():  # in which nothing has a graph, whatever the grad mode
            with torch.inference_mode(False), torch.no_grad():
                return _ReversibleFunction.backward(ctx, *grad_outputs)
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "torch.vmap over gradients of a layer that is reconstructed is refused; take torch.autograd.grad(..., "
                'is_grads_batched=True), torch.func.jacrev, or activations="store"'
            )
        grads: list[Tensor | None] = grad_outputs[0] if _BOXED else list(grad_outputs)
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a layer that is reconstructed cannot be differentiated twice (create_graph=True); "
                'switch its sequence to activations="store", or to a plan of "store" and "recompute" alone'
            )
        job: _Job = ctx.job
        state = list(ctx.saved_tensors)
        job.run.check_unchanged(ctx.versions)
        if hasattr(ctx, "maybe_clear_saved_tensors"):
            ctx.maybe_clear_saved_tensors()
        context = [state.pop() for _ in range(job.context.count)][::-1]
        grad_log_det = grads.pop() if job.has_log_det else None
        needs = ctx.needs_input_grad[1 : 1 + job.states]
        replay = Replay(ctx.autocast, job.run, job.context, context, grad_log_det)
        for index in reversed(range(len(job.run.layers))):
            layer, evaluated = job.run.layers[index], ctx.evaluations[index]
            wanted = needs if index == 0 else None
            if evaluated is None:
                # What was moved ahead of the first layer that computes is not needed any more.
                replay.reverse_rearrangement(layer, state, grads, needed=index > ctx.begins)
            elif isinstance(evaluated, list):
                steps = list(evaluated)
                while steps:
                    step, evaluation = steps.pop()
                    needed = wanted is None or bool(steps) or wanted[1 - step.moved]
                    replay.reverse_step(step, evaluation, state, grads, needed)
            else:
                replay.reverse_layer(layer, evaluated, state, grads, wanted)
            if index == ctx.begins:
                job.run.report(ctx.sample.error(tuple(state)))
        _check_known(replay, job)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.evaluations = ctx.sample = None  # as what is saved goes, too, though somebody may hold the loss
        flat: list[Tensor | None] = [g if need else None for g, need in zip(grads, needs, strict=True)]
        flat += [grad_log_det] * job.has_log_det
        flat += [replay.sums.get(id(t)) for t in (*replay.context_aliases, *job.trainable)]
        return (None, *flat)


def _check_known(replay: Replay, job: _Job) -> None:
    """RuntimeError if there are gradients of parameters that autograd was not told of in the forward pass."""
    known = {id(t) for t in (*replay.context_aliases, *job.trainable)}
    if any(key not in known for key in replay.sums):
        raise RuntimeError(
            "a branch of a reversible sequence made a parameter, or let it require grad, in its forward pass, too late "
            "for a gradient of this step; run one forward pass under torch.no_grad() first"
        )


def _observed(
    run: Run, layer: nn.Module, state: State, context: Any, log_det: Tensor | None
) -> tuple[State, Tensor | None, Evaluation]:
    (output, log_det), evaluation = observe(
        layer, state, lambda *state: apply_layer(layer, state, context, log_det, run.exact)
    )
    return output, log_det, evaluation if run.tolerance is None else evaluation.sampled(output)


def _moves_only(layer: nn.Module) -> bool:
    """Whether a layer is a rearrangement that has nothing to repeat: one that is fixed, has no state and no hooks."""
    return (
        isinstance(layer, Rearrangement)
        and layer.fixed
        and not any(
            m._parameters
            or m._buffers
            or m._forward_hooks
            or m._forward_pre_hooks
            or m._backward_hooks
            or m._backward_pre_hooks
            for m in modules_in(layer)
        )
    )


def _check_hooks(layer: Coupling) -> None:
    for name in ("forward", "forward_and_log_det"):
        if getattr(type(layer), name) is not getattr(Coupling, name) or name in layer.__dict__:
            raise TypeError(
                f"{type(layer).__name__} has a `{name}` of its own, which could not be undone where the layer is "
                f'reconstructed; say all that it does in `steps`, or give it "recompute" or "store"'
            )
    if layer._backward_hooks or layer._backward_pre_hooks:
        raise ValueError(
            f"{type(layer).__name__} has a backward hook, which would not run where the layer is reconstructed; "
            f'register it on its branches, or give the layer "recompute" or "store"'
        )


@contextmanager
def _unchanged_by_hooks(layer: Coupling, state: State, context: Any) -> Iterator[None]:
    """ValueError if forward hooks of the layer put something in the place of its input or output.

    It would be missing where the layer is undone, step by step.
    """
    if not (layer._forward_hooks or layer._forward_pre_hooks):
        yield
        return
    seen: dict[str, Any] = {}
    with (
        layer.register_forward_pre_hook(
            lambda _, inputs, named: seen.update(inputs=(*inputs, named.get("context"))), with_kwargs=True
        ),
        layer.register_forward_hook(lambda _, __, output: seen.update(output=output), prepend=True),
        layer.register_forward_hook(lambda _, __, output: seen.update(returned=output)),
    ):
        yield
    # Empty where a log-determinant is asked for: hooks do not run then.
    pairs = [(seen["inputs"], (*state, context)), (seen["output"], seen["returned"])] if seen else []
    if any(a is not b for found, given in pairs for a, b in zip(found, given, strict=True)):
        raise ValueError(
            f"a forward hook of {type(layer).__name__} changes its input or output, which could not be undone where "
            f'the layer is reconstructed; put it on a branch, or give the layer "recompute" or "store"'
        )


def _check_all_in_branches(layer: Coupling, evaluations: list[Evaluation]) -> None:
    """TypeError where the parameters of a layer and those of its branches are not the same."""
    modules = set(modules_in(layer))
    own = {id(p) for module in modules for _, p in parameters_of(module)}
    for evaluation in evaluations:
        for owner, name, parameter, needs_grad in evaluation.parameters:
            if needs_grad and owner not in modules and id(parameter) not in own:
                raise TypeError(
                    f"parameter {name!r} of {type(owner).__name__}, in a branch of {type(layer).__name__}, is not "
                    f"registered there, so it would get no gradient; register the module that holds it (in an "
                    f"nn.ModuleList instead of a list)"
                )
    covered = {id(p) for e in evaluations for _, _, p, _ in e.parameters}
    for name, parameter in layer.named_parameters():
        if id(parameter) not in covered:
            raise TypeError(
                f"parameter {name!r} of {type(layer).__name__} belongs to no branch of its `steps`, so it would get no "
                f"gradient; move it into a branch"
            )
