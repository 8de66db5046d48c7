"""Learning-rate schedules over a known number of optimizer steps.

Each is a factory `(optimizer, total_steps) -> scheduler`, to be stepped after every optimizer step, and scales the rate
that the optimizer was made with. Nothing but the step count and that rate is in a scheduler's state, so a training that
is resumed with another length follows the schedule of that length (torch's own `OneCycleLR` would raise).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["step_decay", "one_cycle", "warmup_cosine", "constant_rate"]


def step_decay(
    optimizer: Optimizer,
    total_steps: int,
    milestones: Sequence[float] = (0.5, 0.75),
    gamma: float = 0.1,
) -> LambdaLR:
    """Multiply the rate by `gamma` at every milestone.

    `rate(t) = lr * gamma ** #{m : t >= m * total_steps}`. The defaults are the schedule of Gomez et al. (2017) for
    CIFAR: divided by ten at 40,000 and again at 60,000 of 80,000 steps.

    Args:
        optimizer: whose rates are scaled.
        total_steps: optimizer steps of the whole training.
        milestones: increasing fractions of `total_steps`, each between 0 and 1.
        gamma: factor at each milestone.

    Raises:
        ValueError: if the milestones are not increasing fractions.

    Example:
        >>> import torch
        >>> from revnet.training import step_decay
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> step_decay(optimizer, total_steps=80_000).get_last_lr()
        [0.1]
    """
    if list(milestones) != sorted(milestones) or not all(0 <= m <= 1 for m in milestones):
        raise ValueError(
            f"milestones must be increasing fractions of the training, such as [0.5, 0.75]: got {list(milestones)}"
        )
    steps = [round(milestone * total_steps) for milestone in milestones]
    return LambdaLR(optimizer, lambda step: gamma ** bisect_right(steps, step))


def one_cycle(
    optimizer: Optimizer, total_steps: int, rise: float = 0.25, start: float = 0.1, end: float = 0.001
) -> LambdaLR:
    """Raise the rate in a straight line to the optimizer's own, then lower it in another.

    For short trainings with a high rate; for long ones `warmup_cosine` or `step_decay` are as good and less sensitive.

    Args:
        optimizer: whose rates are scaled.
        total_steps: optimizer steps of the whole training.
        rise: fraction of `total_steps` after which the optimizer's own rate is reached, more than 0 and less than 1;
            torch's `pct_start`.
        start: first rate over the optimizer's own, one over torch's `div_factor`.
        end: last rate over the optimizer's own.

    Raises:
        ValueError: if `rise` is outside its range.

    Source: Smith and Topin, Super-Convergence (2018).

    Example:
        >>> import torch
        >>> from revnet.training import one_cycle
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
        >>> one_cycle(optimizer, total_steps=1000, start=0.1).get_last_lr()
        [0.05]
    """
    if not 0 < rise < 1:
        raise ValueError(f"rise must be a fraction of the training, more than 0 and less than 1: got {rise}")
    peak = rise * (total_steps - 1)

    def factor(step: int) -> float:
        if step < peak:
            return start + (1 - start) * step / peak
        return 1 + (end - 1) * min(1.0, (step - peak) / (total_steps - 1 - peak or 1))

    return LambdaLR(optimizer, factor)


def warmup_cosine(optimizer: Optimizer, total_steps: int, warmup: float = 0.05) -> LambdaLR:
    """Raise the rate linearly to the optimizer's own, then lower it to zero along half a cosine.

    Args:
        optimizer: whose rates are scaled.
        total_steps: optimizer steps of the whole training.
        warmup: fraction of `total_steps` that the rise takes, at least 0 and less than 1.

    Raises:
        ValueError: if `warmup` is outside its range.

    Source: Loshchilov and Hutter, SGDR (2017), without restarts.

    Example:
        >>> import torch
        >>> from revnet.training import warmup_cosine
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
        >>> warmup_cosine(optimizer, total_steps=100, warmup=0.04).get_last_lr()
        [0.1]
    """
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup must be a fraction of the training, at least 0 and less than 1: got {warmup}")
    rise = round(warmup * total_steps)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, total_steps - rise))))

    return LambdaLR(optimizer, factor)


def constant_rate(optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Keep the optimizer's own rate."""
    return LambdaLR(optimizer, lambda step: 1.0)
