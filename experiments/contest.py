"""Contestants that take turns, so that a machine which becomes slower or faster does so for all of them."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

__all__ = ["GRAPH", "capture", "take_turns"]

GRAPH = ", CUDA graph"  # ends the name of a contestant that is replayed


def take_turns(
    names: Sequence[str],
    prepare: Callable[[str], Callable[[], Any]],
    rounds: Iterable[int],
    warmup: int,
    device: str,
) -> dict[str, dict[str, Any]]:
    """Figures of each contestant: seconds, the median of its ratio to "store" within a round, minor page faults.

    Args:
        names: the contestants, "store" among them. Each takes one turn a round; the first of one round is the last of
            the next.
        prepare: makes a contestant ready, unmeasured, and returns the step that is measured.
        rounds: 0, 1, 2, ... (perhaps with a progress bar around).
        warmup: how many rounds at the start do not count.
        device: "cpu" or "cuda".
    """
    seconds: dict[str, list[float]] = {name: [] for name in names}
    faults: dict[str, list[int]] = {name: [] for name in names}
    for turn in rounds:
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            step = prepare(name)
            gc.collect()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            start = _clock(device)
            step()
            elapsed = _clock(device) - start
            if turn >= warmup:
                seconds[name].append(elapsed)
                faults[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return {
        name: {
            "seconds": median(seconds[name]),
            "over_store": median(s / t for s, t in zip(seconds[name], seconds["store"], strict=True)),
            "minor_faults": median(faults[name]),
            "all_seconds": seconds[name],
        }
        for name in names
    }


def capture(step: Callable[[], None], leaves: Sequence[Tensor]) -> tuple[Callable[[], None], int]:
    """The replay of a step as a CUDA graph, and the bytes of its activations and temporaries at the peak.

    Args:
        step: what is captured, after three runs that are not.
        leaves: all that it gives gradients. They have none in the end; replays write theirs to memory of their own.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    _clear(leaves)  # or the graph would add to what is freed below
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    gradients = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    peak = torch.cuda.max_memory_allocated() - before - gradients
    _clear(leaves)
    return graph.replay, peak


def _clear(leaves: Iterable[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


def _clock(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()
