"""What was measured of a training step, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from revnet.profiling.memory import Memory

__all__ = ["Measurement", "Time"]


@dataclass(frozen=True)
class Time:
    """Seconds of one training step: medians over the repeats, and the quartiles of the whole step.

    Attributes:
        forward: the forward pass and the loss.
        backward: the backward pass.
        optimizer: the optimizer's step, 0 without one.
        step: all of it.
        step_quartiles: first and third quartile of `step`.
    """

    forward: float
    backward: float
    optimizer: float
    step: float
    step_quartiles: tuple[float, float]


@dataclass(frozen=True)
class Measurement:
    """Memory (bytes), time (seconds) and arithmetic of a training step.

    Attributes:
        memory, time: see `Memory` and `Time`.
        flops: floating-point operations of a forward and a backward pass (second evaluations included), counted by
            `torch.utils.flop_counter`: two for a multiplication and addition, of products and convolutions alone.
        images_per_second: examples of the batch per second of a step.
        environment: what it was measured with: device, versions, threads, input, dtype.
    """

    memory: Memory
    time: Time
    flops: int
    images_per_second: float
    environment: dict[str, Any]

    def __str__(self) -> str:
        low, high = self.time.step_quartiles
        lines = [str(self.memory)]
        phases = ("forward", "backward", "optimizer", "step")
        lines += [f"{name:<14}{getattr(self.time, name) * 1e3:>12,.1f} ms" for name in phases]
        lines[-1] += f"  (quartiles {low * 1e3:,.1f} to {high * 1e3:,.1f})"
        lines.append(f"{'arithmetic':<14}{self.flops / 1e9:>12,.1f} GFLOP")
        lines.append(f"{'speed':<14}{self.images_per_second:>12,.1f} images/s")
        lines += [f"{name:<14}{value}" for name, value in self.environment.items()]
        return "\n".join(lines)
