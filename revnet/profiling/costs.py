"""What each layer of a network costs under each value of `activations`, found by steps without data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from revnet.profiling.estimate import without_data
from revnet.profiling.step import Loss, loss_of
from revnet.profiling.timeline import MemoryTimeline
from revnet.reversible import ACTIVATIONS, Slot, is_recomputing, set_activations, slots

__all__ = ["LayerCost", "layer_costs"]

FLOPS_PER_BYTE = 30  # an operator that computes less for each byte it moves is limited by the memory, on most devices


@dataclass(frozen=True)
class LayerCost:
    """Bytes and time of one layer by the value of `activations`, for those values that the layer can take.

    Attributes:
        name: of the layer in its model.
        seconds: time of forward, second forward and backward pass, in any unit.
        working: most bytes live at once while the layer runs forward or backward, beyond what is kept for the layers
            ahead of it. The gradients of the parameters behind it belong to it.
        inner: bytes kept for the backward pass besides the layer's input.
        input_bytes: bytes of the layer's input.
        input_stored: bytes of the input that are kept where this layer and the one ahead of it store.
        starts_sequence: whether it is the first of its sequence, so that a run of layers cannot reach across its input.
    """

    name: str
    seconds: dict[str, float]
    working: dict[str, int]
    inner: dict[str, int]
    input_bytes: int
    input_stored: int
    starts_sequence: bool

    def kept(self, before: str, value: str) -> int:
        """Bytes kept for the layer under `value`, its input included; `before` is the value of the layer ahead of it.

        A run that ends with a reconstructed layer keeps its output, which is this layer's input.
        """
        is_output_of_run = before == "reconstruct" and (self.starts_sequence or value == "store")
        if value == "recompute" or is_output_of_run:
            return self.inner[value] + self.input_bytes
        return self.inner[value] + (self.input_stored if value == "store" else 0)


def layer_costs(model: nn.Module, input_shape: Sequence[int], loss: Loss, dtype: torch.dtype | None) -> list[LayerCost]:
    """The costs of every slot of a model (see `slots`), from one step without data under each of the three values.

    Time is modelled: an operator takes as long as its arithmetic or its traffic with the memory, whichever is more; a
    backward pass takes two forward passes, and reconstruction moves the state three times besides.

    Raises:
        ValueError: the model has no slots, or runs a layer without calling it.
    """
    if not slots(model):
        raise ValueError(
            f"{type(model).__name__} has no ReversibleSequence, so there is nothing to plan: "
            f"choose a network of reversible sequences, such as those of revnet.models, or leave the budget out"
        )
    steps: dict[str, _Step] = {}
    values: dict[str, list[str]] = {}
    for uniform in ACTIVATIONS:
        with without_data(model, input_shape) as (fake, input):
            set_activations(fake, uniform)
            values[uniform] = [slot.value() for slot in slots(fake)]
            with _Step(slots(fake), [*fake.parameters(), *fake.buffers(), input]) as steps[uniform]:
                value = loss_of(fake, input, loss, dtype)
                steps[uniform].turn()
                value.backward()
            if uniform == "store":
                _check_seen(model, slots(fake), steps[uniform])
    return [
        _cost(slot, index, steps, {uniform: values[uniform][index] for uniform in ACTIVATIONS})
        for index, slot in enumerate(slots(model))
    ]


def _check_seen(model: nn.Module, found: Sequence[Slot], stored: _Step) -> None:
    """ValueError where a layer got gradients though it was never called: its costs went to the layer ahead of it."""
    for slot, size, ours in zip(slots(model), stored.input_bytes, found, strict=True):
        if size == 0 and any(p.grad is not None for module in ours.modules() for p in module.parameters()):
            raise ValueError(
                f"{type(model).__name__} runs {slot.name} without calling it, as flows do for the log-determinant, so "
                f"that what it costs is not seen: choose one value of activations for all layers"
            )


def _cost(slot: Slot, index: int, steps: dict[str, _Step], values: dict[str, str]) -> LayerCost:
    stored = steps["store"]
    forward, state = stored.traffic[index], stored.input_bytes[index]
    seconds: dict[str, float] = {}
    working: dict[str, int] = {}
    inner: dict[str, int] = {}
    for uniform, value in values.items():
        again = {"store": 0, "recompute": steps[uniform].again[index], "reconstruct": forward + 3 * state}
        seconds[value] = 3.0 * forward + again[value]
        working[value] = max(working.get(value, 0), steps[uniform].working(index))
        inner[value] = max(inner.get(value, 0), steps[uniform].inner[index])
    starts = slot.index in (0, None)
    return LayerCost(slot.name, seconds, working, inner, state, stored.kept_inputs[index], starts)


class _Step(MemoryTimeline):
    """The timeline of one step, cut into the stretches in which the layers run, and what each of them keeps.

    Attributes:
        traffic: for each layer the time of its forward pass, in bytes that could be moved meanwhile.
        again: the same of what is done again for a recomputed layer, which ends ahead of a block's last convolution.
        input_bytes: for each layer the bytes of its input.
        kept_inputs: how many of them live between the passes.
        inner: for each layer the bytes of what else was born in its forward pass and lives between the passes.
    """

    def __init__(self, found: Sequence[Slot], known: Sequence[Tensor]) -> None:
        super().__init__(known)
        self.traffic, self.again, self.input_bytes, self.kept_inputs, self.inner = ([0] * len(found) for _ in range(5))
        self._found = found
        self._stretches = [(0, 0)]  # (moment, number of the layer that runs from there on)
        self._inputs: dict[int | None, int] = {}  # layers by the numbers of the storages that are their inputs
        self._forward = True
        self._handles: list[Any] = []

    def __enter__(self) -> Any:
        for layer, slot in enumerate(self._found):
            first, *_ = slot.modules()
            self._handles.append(first.register_forward_pre_hook(partial(self._runs, layer)))
            # The second evaluation of a coupling is that of its branches.
            again = partial(self._runs_again, layer)
            self._handles += [child.register_forward_pre_hook(again) for child in first.children()]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        while self._handles:
            self._handles.pop().remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if (self._forward or is_recomputing()) and not func.is_view:
            tensors = [t for t in pytree.tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            moved = sum(t.nbytes for t in tensors)
            flops = flop_registry.get(func.overloadpacket)
            arithmetic = 0 if flops is None else flops(*args, **(kwargs or {}), out_val=result)
            times = self.traffic if self._forward else self.again
            times[self._stretches[-1][1]] += max(moved, arithmetic // FLOPS_PER_BYTE)
        return result

    def turn(self) -> None:
        """Notes what is kept, at the moment between the passes."""
        self._forward = False
        for number, (born, size) in self.alive(self.now()).items():
            if number in self._inputs:
                self.kept_inputs[self._inputs[number]] += size
            else:
                layer = next(layer for moment, layer in reversed(self._stretches) if moment <= born)
                self.inner[layer] += size

    def working(self, index: int) -> int:
        """Most bytes live at once while a layer runs, beyond what is kept for the layers ahead of it."""
        ends = [moment for moment, _ in self._stretches[1:]] + [self.now()]
        ours = [(start, end) for (start, layer), end in zip(self._stretches, ends, strict=True) if layer == index]
        curve = [0, *self.bytes_over_time()]
        ahead = sum(self.inner[:index]) + sum(self.kept_inputs[:index])
        return max((max(curve[start : end + 1]) for start, end in ours), default=ahead) - ahead

    def _runs(self, layer: int, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._stretches.append((self.now(), layer))
        if not self._forward:
            return
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        self.input_bytes[layer] += sum(x.nbytes for x in tensors)
        self._inputs |= dict.fromkeys(self.numbers_of(tensors), layer)
        # Under ordinary autograd the layer ahead has its turn again when all gradients of its output are there.
        awaited = [x for x in tensors if x.requires_grad] if layer > 0 else []
        arrived: list[None] = []
        for x in awaited:
            x.register_hook(partial(self._gradient_arrives, layer - 1, arrived, len(awaited)))

    def _runs_again(self, layer: int, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not self._forward and is_recomputing():
            self._stretches.append((self.now(), layer))

    def _gradient_arrives(self, layer: int, arrived: list[None], awaited: int, gradient: Tensor) -> None:
        arrived.append(None)
        if len(arrived) == awaited:
            self._stretches.append((self.now(), layer))
