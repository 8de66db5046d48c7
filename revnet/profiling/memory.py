"""The memory of a training step, split by what it holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revnet.profiling.allocator import Allocator
from revnet.profiling.step import Loss, MakeOptimizer, build_optimizer, loss_of
from revnet.profiling.timeline import MemoryTimeline, storages

__all__ = ["Memory", "memory_of_step"]


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step in steady state: gradients are None at its beginning, the optimizer has its state.

    Attributes:
        parameters: parameters and buffers.
        gradients: gradients of the parameters, all of them, as after the backward pass.
        optimizer: state of the optimizer, 0 without one.
        input: the batch.
        kept: activations live between the forward and the backward pass.
        activations: those of the peak: what the forward pass left and nothing has freed yet.
        temporaries: the rest of the peak.
        total: most bytes live at once of everything in the step, the optimizer's part included. This decides whether a
            step fits.
    """

    parameters: int
    gradients: int
    optimizer: int
    input: int
    kept: int
    activations: int
    temporaries: int
    total: int

    @property
    def peak(self) -> int:
        """Most activations and temporaries live at once in the forward and the backward pass.

        Parameters, buffers, gradients of the parameters, optimizer state and input are left out.
        """
        return self.activations + self.temporaries

    def __str__(self) -> str:
        names = ("parameters", "gradients", "optimizer", "input", "kept", "activations", "temporaries", "peak", "total")
        return "\n".join(f"{name:<14}{getattr(self, name) / 1e6:>12,.1f} MB" for name in names)


def memory_of_step(
    model: nn.Module,
    input: Tensor,
    loss: Loss,
    dtype: torch.dtype | None,
    optimizer: MakeOptimizer | None,
    allocator: Allocator | None = None,
) -> Memory:
    """Runs a step, real or fake, and counts it tensor by tensor. Gradients and changed weights are left to the caller.

    The optimizer steps twice: the first step creates its state, the second is the one of a steady state. What the
    allocator took beyond the tensors that were counted is added to the temporaries.
    """
    fixed = [*model.parameters(), *model.buffers()]
    with MemoryTimeline([*fixed, input]) as timeline:
        stepper = build_optimizer(model, optimizer)
        value = loss_of(model, input, loss, dtype)
        between = timeline.now()
        value.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        differentiated = timeline.now()
        unseen = 0 if allocator is None else max(0, allocator.most() - timeline.peak())
        stepping = 0
        if stepper is not None:
            stepper.step()
            settled = timeline.now()
            if allocator is not None:
                allocator.reset()
            stepper.step()
            stepping = max(timeline.peak(since=settled), 0 if allocator is None else allocator.most())
    state = [] if stepper is None else [t for t in pytree.tree_leaves(dict(stepper.state)) if isinstance(t, Tensor)]
    activations, temporaries = timeline.peak_parts(between, differentiated, without=[*gradients, *state])
    batch = bytes_of([input]) if input.is_sparse else input.nbytes  # which may be a slice of a whole data set
    parameters, settled_state = bytes_of(fixed), bytes_of(state)
    differentiating = timeline.peak(until=differentiated, without=state) + unseen + settled_state
    return Memory(
        parameters=parameters,
        gradients=bytes_of(gradients),
        optimizer=settled_state,
        input=batch,
        kept=timeline.live(between, without=[*gradients, *state]),
        activations=activations,
        temporaries=temporaries + unseen,
        total=parameters + batch + max(differentiating, stepping),
    )


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of the tensors, each once."""
    return sum({storage._cdata: storage.nbytes() for t in tensors for storage in storages(t)}.values())
