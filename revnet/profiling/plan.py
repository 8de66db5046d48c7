"""Spends a memory budget: which layers of a network store their activations, and which give them up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, overload

import torch
from torch import nn

from revnet.profiling.budget import parse_bytes
from revnet.profiling.costs import LayerCost, layer_costs
from revnet.profiling.estimate import checked_shape, estimate, fake_copy
from revnet.profiling.memory import Memory
from revnet.profiling.step import Loss, MakeOptimizer, mean_square
from revnet.reversible import set_activations, slots

__all__ = ["Plan", "cheapest", "leanest", "plan", "predicted_peak", "predicted_seconds"]

HALVINGS = 10  # of the range between the leanest plan and storing everything: to a thousandth


@dataclass(frozen=True)
class Plan(Sequence[str]):
    """One value of `activations` for each layer, as `set_activations(model, plan)` takes it.

    Attributes:
        values: "store", "recompute" or "reconstruct" for each layer, a stem and a tail included.
        names: names of the layers in the model.
        memory: memory of a training step under the plan, by `estimate`.
        seconds_over_store: predicted time of a step in relation to one that stores everything.
    """

    values: tuple[str, ...]
    names: tuple[str, ...]
    memory: Memory
    seconds_over_store: float

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self.values[index]

    def __str__(self) -> str:
        lines = [
            f"{self.memory.total / 1e6:,.1f} MB in all, {self.memory.peak / 1e6:,.1f} MB of them activations and "
            f"temporaries; {self.seconds_over_store:.2f} times the time of storing everything"
        ]
        layers = zip(self.names, self.values, strict=True)
        for part, found in groupby(layers, key=lambda layer: layer[0].rpartition(".")[0] or layer[0]):
            runs = [(value, len(list(run))) for value, run in groupby(value for _, value in found)]
            lines.append(f"{part}: " + ", ".join(value if count == 1 else f"{count} {value}" for value, count in runs))
        return "\n".join(lines)


def plan(
    model: nn.Module,
    input_shape: Sequence[int],
    budget: int | str,
    loss: Loss = mean_square,
    dtype: torch.dtype | None = None,
    optimizer: MakeOptimizer | None = None,
) -> Plan:
    """The plan of least predicted time among those whose training step takes no more than `budget`.

    minimise    sum_i seconds_i(v_i)
    subject to  sum_{j<i} kept_j(v_j) + working_i(v_i) <= budget    for every layer i

    What is kept for the layers ahead of i is there while i computes its gradients, so that the peak is a maximum over
    the layers and not a sum. The figures of the layers come from steps without data, the search is exact
    (`cheapest`), and `memory` is that of a step under the plan as a whole (`estimate`).

    Args:
        model: a network with reversible sequences, such as every RevNet; it is not changed.
        input_shape: shape of a batch, the batch dimension included.
        budget: for everything in the step (`Memory.total`): bytes, or a size with a unit (`parse_bytes`). Leave part
            of a device for what an estimate does not see, see `max_batch`.
        loss, dtype, optimizer: as for `estimate`.

    Do not use it where the budget holds the whole step in any case: "store" is what it then gives.

    Raises:
        ValueError: no plan keeps to the budget (the message says the least that would do), the model has no reversible
            sequence or runs its layers without calling them, as a flow does, or `estimate` refuses it.

    Example:
        >>> from revnet import set_activations
        >>> from revnet.models import revnet38
        >>> from revnet.profiling import plan
        >>> network = revnet38()
        >>> found = plan(network, (16, 3, 32, 32), budget="35MB")
        >>> found.memory.total <= 35e6, found.seconds_over_store < 1.3
        (True, True)
        >>> set_activations(network, found)
    """
    available, shape = parse_bytes(budget, "budget"), checked_shape("input_shape", input_shape)
    copy = fake_copy(model)
    costs = layer_costs(copy, shape, loss, dtype)
    all_stored = predicted_seconds(costs, ["store"] * len(costs))

    def needed(found: Plan) -> int:
        # Steps without data take batch normalisation's statistics for narrower than they are under autocast.
        return found.memory.total if dtype is None else math.ceil(1.002 * found.memory.total)

    def planned(values: tuple[str, ...]) -> Plan:
        set_activations(copy, values)
        memory = estimate(copy, shape, loss=loss, dtype=dtype, optimizer=optimizer)
        names = tuple(cost.name for cost in costs)
        return Plan(values, names, memory, predicted_seconds(costs, values) / all_stored)

    stored = planned(("store",) * len(costs))
    if needed(stored) <= available:
        return stored
    lean = leanest(costs)
    best = planned(lean)
    if needed(best) > available:  # predictions are a little off, and may have spent more than that on time
        set_activations(copy, "reconstruct")
        best = min(best, planned(tuple(slot.value() for slot in slots(copy))), key=needed)
    if needed(best) > available:
        raise ValueError(
            f"budget={budget!r} is too small for {type(model).__name__} on a batch of shape {shape}: the least "
            f"possible is {needed(best):,} bytes; give at least that much, a smaller batch or another optimizer"
        )
    # At the borders of runs the search's figures are a little off those of the step as a whole. The places of the
    # bisection do not depend on the budget, so that more of it never gives a slower plan.
    low, high = predicted_peak(costs, lean), predicted_peak(costs, stored.values)
    for _ in range(HALVINGS):
        middle = (low + high) // 2
        values = cheapest(costs, middle)
        assert values is not None
        found = best if values == best.values else planned(values)
        if needed(found) <= available:
            best, low = found, middle
        else:
            high = middle
    return best


def predicted_peak(costs: Sequence[LayerCost], values: Sequence[str]) -> int:
    """Most bytes live at once in a step, gradients of the parameters included, parameters excluded."""
    kept, peak, before = 0, 0, "store"
    for cost, value in zip(costs, values, strict=True):
        peak = max(peak, kept + cost.working[value])
        kept += cost.kept(before, value)
        before = value
    return peak


def predicted_seconds(costs: Sequence[LayerCost], values: Sequence[str]) -> float:
    """Time of a step, in the unit of the costs."""
    return sum(cost.seconds[value] for cost, value in zip(costs, values, strict=True))


class _Partial(NamedTuple):
    """Values of the first layers, with what they keep and take."""

    kept: int
    seconds: float
    value: str
    before: _Partial | None


def cheapest(costs: Sequence[LayerCost], budget: int) -> tuple[str, ...] | None:
    """The values of least `predicted_seconds` whose `predicted_peak` is within the budget, None if there are none.

    Exact: layer by layer, of the choices so far that end with the same value only those are dropped that keep no less
    and take no less time than another one.
    """
    front = [_Partial(0, 0.0, "store", None)]
    for cost in costs:
        longer = [
            _Partial(p.kept + cost.kept(p.value, value), p.seconds + seconds, value, p)
            for p in front
            for value, seconds in cost.seconds.items()
            if p.kept + cost.working[value] <= budget
        ]
        longer.sort(key=lambda p: (p.value, p.kept, p.seconds))
        front = []
        for _, same in groupby(longer, key=lambda p: p.value):
            fastest = float("inf")
            for partial in same:
                if partial.seconds < fastest:
                    fastest = partial.seconds
                    front.append(partial)
    if not front:
        return None
    return tuple(_values(min(front, key=lambda p: (p.seconds, p.kept))))[::-1]


def _values(partial: _Partial | None) -> Iterator[str]:
    while partial is not None and partial.before is not None:
        yield partial.value
        partial = partial.before


def leanest(costs: Sequence[LayerCost]) -> tuple[str, ...]:
    """The values of least `predicted_peak`, and among those of least time."""
    low, high = 0, predicted_peak(costs, ["store"] * len(costs))
    while low < high:
        middle = (low + high) // 2
        if cheapest(costs, middle) is None:
            low = middle + 1
        else:
            high = middle
    found = cheapest(costs, high)
    assert found is not None
    return found
