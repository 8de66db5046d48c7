"""Measures memory and time of a training step of any module."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revnet.profiling.timeline import MemoryTimeline

__all__ = ["Measurement", "Memory", "Time", "measure", "measure_memory", "measure_time"]

Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step.

    Attributes:
        parameters: parameters and buffers.
        gradients: gradients of the parameters.
        kept: activations live between the forward and the backward pass.
        peak: most activations and temporaries live at once in the step; parameters, buffers, their gradients and the
            input excluded. This, not `kept`, decides whether a step fits.
    """

    parameters: int
    gradients: int
    kept: int
    peak: int


@dataclass(frozen=True)
class Time:
    """Seconds of one training step: medians over the repeats, and the quartiles of the whole step."""

    forward: float
    backward: float
    step: float
    step_quartiles: tuple[float, float]


@dataclass(frozen=True)
class Measurement:
    """Memory (bytes) and time (seconds) of a training step."""

    memory: Memory
    time: Time
    images_per_second: float


def _mean_square(output: Any) -> Tensor:
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    if not tensors:
        raise ValueError("the model returned no floating-point tensor; pass `loss`, a function from output to scalar")
    return torch.stack([t.float().square().mean() for t in tensors]).sum()


def _autocast(input: Tensor, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return torch.autocast(input.device.type, dtype=dtype, enabled=dtype is not None)


def measure_memory(
    model: nn.Module, input: Tensor, loss: Loss = _mean_square, autocast: torch.dtype | None = None
) -> Memory:
    """Memory of one forward and backward pass, counted tensor by tensor; see `Memory`.

    Args:
        model: any module; it is left in the mode it is in, its gradients are cleared.
        input: a batch.
        loss: function from the model's output to a scalar; the mean square by default.
        autocast: half-precision dtype of torch.autocast, None for none.
    """
    for parameter in model.parameters():
        parameter.grad = None
    known = [*model.parameters(), *model.buffers(), input]
    with MemoryTimeline(known) as timeline:
        with _autocast(input, autocast):
            value = loss(model(input))
        between = timeline.now()
        value.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return Memory(
        parameters=_bytes([*model.parameters(), *model.buffers()]),
        gradients=_bytes(gradients),
        kept=timeline.live(between, without=gradients),
        peak=timeline.peak(without=gradients),
    )


def _bytes(tensors: list[Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def measure_time(
    model: nn.Module,
    input: Tensor,
    loss: Loss = _mean_square,
    autocast: torch.dtype | None = None,
    repeats: int = 5,
    warmup: int = 1,
) -> Time:
    """Wall time of a forward and backward pass, the median of `repeats` after `warmup` unmeasured ones.

    To compare two models, interleave calls with `repeats=1`: machines drift. On a CPU set the allocator to keep
    the memory it freed (MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ high), or what saves memory looks faster than
    it is.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")

    def clock() -> float:
        if input.device.type != "cpu":
            torch.accelerator.synchronize(input.device)
        return time.perf_counter()

    forward, backward = [], []
    for _ in range(warmup + repeats):
        for parameter in model.parameters():
            parameter.grad = None
        start = clock()
        with _autocast(input, autocast):
            value = loss(model(input))
        middle = clock()
        value.backward()
        forward.append(middle - start)
        backward.append(clock() - middle)
    forward, backward = forward[warmup:], backward[warmup:]
    steps = sorted(f + b for f, b in zip(forward, backward, strict=True))
    quartiles = (steps[len(steps) // 4], steps[(3 * len(steps)) // 4 - (len(steps) % 4 == 0)])
    return Time(median(forward), median(backward), median(steps), quartiles)


def measure(
    model: nn.Module,
    input: Tensor,
    loss: Loss = _mean_square,
    autocast: torch.dtype | None = None,
    repeats: int = 5,
) -> Measurement:
    """Memory and time of a training step (forward and backward) of any module.

    Args: as `measure_memory` and `measure_time`.

    Example:
        >>> import torch
        >>> from revnet.models import revnet38
        >>> from revnet.profiling import measure
        >>> result = measure(revnet38(), torch.randn(2, 3, 32, 32), repeats=1)
        >>> result.memory.peak > result.memory.kept > 0
        True
    """
    seconds = measure_time(model, input, loss, autocast, repeats)
    memory = measure_memory(model, input, loss, autocast)
    return Measurement(memory, seconds, input.shape[0] / seconds.step)
