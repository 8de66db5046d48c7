"""The memory of a training step, computed without taking the memory or the time."""

from __future__ import annotations

import copy
import logging
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import DynamicOutputShapeException, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._foreach_utils import _get_foreach_kernels_supported_devices

from revnet.profiling.memory import Memory, memory_of_step
from revnet.profiling.operators import TrueSizes, UnknownSize
from revnet.profiling.step import Loss, MakeOptimizer, mean_square

__all__ = ["checked_shape", "estimate", "fake_copy", "without_data"]

_LOOKS_AT_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


def estimate(
    model: nn.Module,
    input_shape: Sequence[int],
    loss: Loss = mean_square,
    dtype: torch.dtype | None = None,
    optimizer: MakeOptimizer | None = None,
) -> Memory:
    """Memory of a training step, split as by `measure_memory`, without allocating any of it; see `Memory`.

    The step runs on tensors without data (torch's `FakeTensorMode`), so that it takes seconds whatever the size. What
    an operator allocates and frees inside itself (a convolution's workspace) is not in it.

    Do not use it for recurrent layers that a library computes (`nn.LSTM` on a CPU; `nn.LSTM`, `nn.GRU` and `nn.RNN` on
    CUDA), nor for sums of sparse gradients: what these keep is known only when they run, so they are refused.

    Args:
        model: any module, in the mode it is in, on the device it is on; the meta device stands for a CPU. It is not
            changed.
        input_shape: shape of a batch, the batch dimension included; the batch has the dtype of the parameters.
        loss: function from the model's output to a scalar; the mean square by default.
        dtype: None for the dtype of the parameters; torch.bfloat16 or torch.float16 for autocast to it.
        optimizer: function from parameters to an optimizer, such as `functools.partial(torch.optim.SGD, lr=0.1)`.

    Raises:
        ValueError: the model does not take inputs of this shape, looks at the values of tensors, or runs an operator
            whose memory is known only with data.

    Example:
        >>> from revnet.models import revnet104
        >>> from revnet.profiling import estimate
        >>> memory = estimate(revnet104(activations="reconstruct"), (1024, 3, 224, 224))
        >>> memory.kept < estimate(revnet104(activations="store"), (1024, 3, 224, 224)).kept / 5
        True
    """
    with without_data(model, input_shape) as (fake, input):
        return memory_of_step(fake, input, loss, dtype, optimizer and _as_for_real(optimizer))


@contextmanager
def without_data(model: nn.Module, input_shape: Sequence[int]) -> Iterator[tuple[nn.Module, Tensor]]:
    """A copy of a model and a batch that have no data, in a context in which steps with them compute nothing."""
    shape = checked_shape("input_shape", input_shape)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = fake_copy(model, mode)
    with mode, TrueSizes(), _quiet():
        first = next((p for p in fake.parameters() if p.is_floating_point()), torch.empty(()))
        input = torch.empty(shape, dtype=first.dtype, device=first.device)
        try:
            yield _Told(fake), input
        except _LOOKS_AT_VALUES as error:
            raise ValueError(
                f"{type(model).__name__}, its loss or its optimizer looks at the values of tensors ({error}), which an "
                f"estimate does not have; use measure_memory"
            ) from error
        except UnknownSize as error:
            raise ValueError(
                f"{_place(error, fake)}: how much memory {error} takes is known only when it runs with data; use "
                f"measure_memory"
            ) from error


def checked_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as a tuple; ValueError if it is none."""
    sizes = shape if isinstance(shape, Sequence) and not isinstance(shape, str) else ()
    if not sizes or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"{name} must be a sequence of positive integers, such as (8, 3, 32, 32); got {shape!r}")
    return tuple(shape)


def fake_copy(model: nn.Module, mode: FakeTensorMode | None = None) -> nn.Module:
    """A copy whose parameters and buffers have no data; on a CPU if the model is on the meta device."""
    mode = mode or FakeTensorMode()
    held = [*model.parameters(), *model.buffers()]
    attributes = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    hung = [t for tensor in held for t in vars(tensor).values() if isinstance(t, Tensor)]
    memo: dict[int, Any] = {}
    with mode:
        # What a forward pass has left in an attribute, with its graph, cannot be copied otherwise.
        left = [*hung, *(t for t in attributes if t.is_meta or not t.is_leaf)]
        for t in (*held, *left):
            # The meta device has neither autocast nor the operators of a device that computes.
            device = "cpu" if t.is_meta else t.device
            fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
            is_parameter = isinstance(t, nn.Parameter)
            memo[id(t)] = nn.Parameter(fake, t.requires_grad) if is_parameter else fake.requires_grad_(t.requires_grad)
    for t in held:
        # A forward pass may read what was hung on a tensor; the attributes that make the new one fake stay its own.
        own = vars(memo[id(t)])
        own.update({name: copy.deepcopy(value, memo) for name, value in vars(t).items() if name not in own})
    return copy.deepcopy(model, memo)


def _place(error: UnknownSize, model: nn.Module) -> str:
    """Where it was raised: the innermost module, by its name in the model."""
    running = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = {module: name for name, module in model.named_modules()}
    innermost = next((x for x in reversed(running) if isinstance(x, nn.Module) and names.get(x)), None)
    whole = type(model).__name__
    return whole if innermost is None else f"{type(innermost).__name__} {names[innermost]!r} of {whole}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps fake tensors from logging the errors that they raise."""
    log = logging.getLogger(FakeTensorMode.__module__)
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


def _as_for_real(optimizer: MakeOptimizer) -> MakeOptimizer:
    """The same, stepping all parameters at once where it does with real ones; with fake ones it would not."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer  # which is refused for what it is

    def build(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        built = optimizer(parameters)
        for group in getattr(built, "param_groups", ()):
            if _takes_all_at_once(built, group):
                kinds = {p.device.type for p in group["params"]}
                group["foreach"] = kinds.issubset(_get_foreach_kernels_supported_devices())
        return built

    return build


def _takes_all_at_once(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether torch chooses so by itself where the device is one for it."""
    if group.get("foreach", False) is not None or group.get("fused") is not None or group.get("differentiable"):
        return False  # it has been chosen, or cannot be
    looped = isinstance(optimizer, torch.optim.Adafactor)
    return not looped and (not isinstance(group["lr"], Tensor) or bool(group.get("capturable")))


class _Told(nn.Module):
    """A model whose errors are told as a wrong `input_shape`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        try:
            return self.model(x)
        except (*_LOOKS_AT_VALUES, UnknownSize):
            raise
        except Exception as error:
            raise ValueError(
                f"input_shape={tuple(x.shape)}: {type(self.model).__name__} does not take it: "
                f"{type(error).__name__}: {error}"
            ) from error
