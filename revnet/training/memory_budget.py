"""A memory budget for a training: the activations of its network are planned to fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn

from revnet.profiling import parse_bytes, plan
from revnet.reversible import set_activations

__all__ = ["spend_memory"]

log = logging.getLogger(__name__)

DTYPES = {"32-true": None, "32": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def spend_memory(
    network: nn.Module,
    memory_budget: int | str,
    input_shape: Sequence[int],
    precision: str,
    optimizer: Callable[..., torch.optim.Optimizer] | None,
    accumulates: bool = False,
) -> None:
    """Switch a network to the fastest plan of activations whose training step fits into a budget, and log it.

    Args:
        network: one with reversible sequences.
        memory_budget: of a step on one device: bytes, or a size with a unit such as 8GiB; see `revnet.profiling.plan`.
        input_shape: of a batch on one device.
        precision: of the trainer, such as "bf16-mixed".
        optimizer: function from parameters to an optimizer.
        accumulates: whether gradients live from one step to the next.

    Raises:
        ValueError: the budget or the precision cannot be planned for.
    """
    if str(precision) not in DTYPES:
        raise ValueError(
            f"memory_budget={memory_budget} is planned for trainer.precision {', '.join(DTYPES)}, got {precision}; "
            f"choose one of these, or set model.activations yourself"
        )
    budget = parse_bytes(memory_budget)
    if accumulates:
        budget -= sum(p.nbytes for p in network.parameters() if p.requires_grad)
    found = plan(network, input_shape, budget, DTYPES[str(precision)], optimizer)
    set_activations(network, found)
    log.info("memory_budget=%s: %s", memory_budget, found)
