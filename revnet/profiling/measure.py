"""Measures memory and time of a training step of any module."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from revnet.profiling.allocator import Allocator, recorded
from revnet.profiling.device import device_name
from revnet.profiling.measurement import Measurement, Time
from revnet.profiling.memory import Memory, memory_of_step
from revnet.profiling.step import Loss, MakeOptimizer, build_optimizer, check_device, loss_of, mean_square, unchanged

__all__ = ["measure", "measure_memory", "measure_time"]


def measure_memory(
    model: nn.Module,
    input: Tensor,
    loss: Loss = mean_square,
    dtype: torch.dtype | None = None,
    optimizer: MakeOptimizer | None = None,
    *,
    snapshot: str | Path | None = None,
) -> Memory:
    """Memory of one training step, counted tensor by tensor; see `Memory`.

    On CUDA `temporaries`, `peak` and `total` also hold what the allocator took beyond that: the workspaces of operators
    and the rounding of sizes.

    Args:
        model: any module, in the mode it is in. Weights, buffers and random generators are left as they were, gradients
            are cleared.
        input: a batch.
        loss: function from the model's output to a scalar; the mean square by default.
        dtype: None for the dtype of the parameters; torch.bfloat16 or torch.float16 for autocast to it.
        optimizer: function from parameters to an optimizer, such as `functools.partial(torch.optim.SGD, lr=0.1)`; None
            for a step that ends with the backward pass.
        snapshot: where to write the record of the CUDA allocator that pytorch.org/memory_viz reads.

    Raises:
        ValueError: model and input are on different devices, the loss is no scalar or depends on no parameter, or
            `snapshot` is given and they are not on a CUDA device.
        TypeError: the optimizer is none, or no function that makes one.

    Example:
        >>> import torch
        >>> from revnet.models import revnet38
        >>> from revnet.profiling import measure_memory
        >>> memory = measure_memory(revnet38(), torch.randn(8, 3, 32, 32))
        >>> memory.total >= memory.peak > memory.activations  # bytes
        True
    """
    check_device(model, input)
    if snapshot is not None and input.device.type != "cuda":
        raise ValueError(
            f"snapshot={str(snapshot)!r} records the CUDA allocator, but the input is on {input.device}; move model "
            f"and input to a CUDA device or leave it out"
        )
    with unchanged(model, input):
        if input.device.type != "cuda":
            return memory_of_step(model, input, loss, dtype, optimizer)
        loss_of(model, input, loss, dtype).backward()  # workspaces that libraries keep are there from now on
        model.zero_grad()
        with recorded(snapshot):
            return memory_of_step(model, input, loss, dtype, optimizer, Allocator(input.device))


def measure_time(
    model: nn.Module,
    input: Tensor,
    loss: Loss = mean_square,
    dtype: torch.dtype | None = None,
    optimizer: MakeOptimizer | None = None,
    repeats: int = 5,
    warmup: int = 1,
) -> Time:
    """Wall time of a training step, the median of `repeats` after `warmup` unmeasured ones.

    To compare two models, interleave calls with `repeats=1`: machines drift. On a CPU run the process with
    `KEEP_FREED_MEMORY` in its environment, or what saves memory looks faster than it is.

    Args: as `measure_memory`; the model is left as there.

    Raises:
        ValueError: `repeats` or `warmup` out of their range, or model and input on different devices.

    Example:
        >>> import torch
        >>> from revnet.models import revnet38
        >>> from revnet.profiling import measure_time
        >>> measure_time(revnet38(), torch.randn(2, 3, 32, 32), repeats=1).step > 0  # seconds
        True
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}")
    check_device(model, input)

    def clock() -> float:
        if input.device.type != "cpu":
            torch.accelerator.synchronize(input.device)
        return time.perf_counter()

    moments = []
    with unchanged(model, input):
        stepper = build_optimizer(model, optimizer)
        for _ in range(warmup + repeats):
            model.zero_grad()
            start = clock()
            value = loss_of(model, input, loss, dtype)
            middle = clock()
            value.backward()
            late = clock()
            if stepper is not None:
                stepper.step()
            moments.append((start, middle, late, clock() if stepper is not None else late))
    moments = moments[warmup:]
    steps = sorted(end - start for start, _, _, end in moments)
    return Time(
        forward=median(middle - start for start, middle, _, _ in moments),
        backward=median(late - middle for _, middle, late, _ in moments),
        optimizer=median(end - late for _, _, late, end in moments),
        step=median(steps),
        step_quartiles=(steps[len(steps) // 4], steps[(3 * len(steps)) // 4 - (len(steps) % 4 == 0)]),
    )


def measure(
    model: nn.Module,
    input: Tensor,
    loss: Loss = mean_square,
    dtype: torch.dtype | None = None,
    optimizer: MakeOptimizer | None = None,
    repeats: int = 5,
    *,
    snapshot: str | Path | None = None,
) -> Measurement:
    """Memory, time and arithmetic of a training step of any module.

    Args:
        model, input, loss, dtype, optimizer, snapshot: as `measure_memory`; the model is left as there.
        repeats: timed steps.

    Example:
        >>> import torch
        >>> from revnet.models import revnet38
        >>> from revnet.profiling import measure
        >>> result = measure(revnet38(), torch.randn(2, 3, 32, 32), repeats=1)
        >>> result.memory.peak > result.memory.kept > 0
        True
    """
    seconds = measure_time(model, input, loss, dtype, optimizer, repeats)
    return Measurement(
        memory=measure_memory(model, input, loss, dtype, optimizer, snapshot=snapshot),
        time=seconds,
        flops=_count_flops(model, input, loss, dtype),
        images_per_second=input.shape[0] / seconds.step,
        environment={
            "device": device_name(input.device),
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "input": list(input.shape),
            "dtype": str(dtype or input.dtype).removeprefix("torch."),
        },
    )


def _count_flops(model: nn.Module, input: Tensor, loss: Loss, dtype: torch.dtype | None) -> int:
    with unchanged(model, input), FlopCounterMode(display=False) as counter:
        loss_of(model, input, loss, dtype).backward()
    return counter.get_total_flops()
