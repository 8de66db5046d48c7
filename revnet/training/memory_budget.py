"""A memory budget for a training: the activations of its network are planned to fit, and advice where they did not."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from revnet.profiling import estimate, max_batch, parse_bytes, plan
from revnet.reversible import set_activations

__all__ = ["spend_memory", "out_of_memory", "memory_of"]

log = logging.getLogger(__name__)

HEADROOM = 0.9  # of a device; the rest is for workspaces of convolutions and what the allocator cannot use
CONTROL_GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # of Linux, versions 1 and 2
DTYPES = {"32-true": None, "32": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def spend_memory(
    network: nn.Module,
    memory_budget: int | str,
    input_shape: Sequence[int],
    precision: str,
    optimizer: Callable[..., torch.optim.Optimizer] | None,
    held: int = 0,
) -> None:
    """Switch a network to the fastest plan of activations whose training step fits into a budget, and log it.

    Args:
        network: one with reversible sequences.
        memory_budget: of a step on one device: bytes, or a size with a unit such as 8GiB; see `revnet.profiling.plan`.
        input_shape: of a batch on one device.
        precision: of the trainer, such as "bf16-mixed".
        optimizer: function from parameters to an optimizer.
        held: bytes that the training holds beside a step: gradients that accumulate, averaged weights, buckets.

    Raises:
        ValueError: the budget or the precision cannot be planned for.
    """
    if str(precision) not in DTYPES:
        raise ValueError(
            f"memory_budget={memory_budget} is planned for trainer.precision {', '.join(DTYPES)}, got {precision}; "
            f"choose one of these, or set model.activations yourself"
        )
    budget = parse_bytes(memory_budget, "memory_budget")
    beside = f"accumulated gradients, averaged weights and buckets take {held:,} bytes"
    if held >= budget:
        raise ValueError(f"memory_budget={memory_budget}: {beside} already; give more")
    try:
        found = plan(network, input_shape, budget - held, dtype=DTYPES[str(precision)], optimizer=optimizer)
    except ValueError as error:
        of_the_rest = f"{beside}, and of what is left " if held else ""
        raise ValueError(f"memory_budget={memory_budget}: {of_the_rest}{error}") from error
    set_activations(network, found)
    log.info("memory_budget=%s: %s", memory_budget, found)


def out_of_memory(
    network: nn.Module,
    input_shape: Sequence[int],
    precision: str,
    optimizer: Callable[..., torch.optim.Optimizer] | None,
    memory: int,
    held: int = 0,
) -> str:
    """One line on a step that did not fit: what it takes, what there is and what would fit.

    Args:
        network: what was trained.
        input_shape: of a batch on one device.
        precision: of the trainer, such as "bf16-mixed".
        optimizer: function from parameters to an optimizer.
        memory: bytes that there are, see `memory_of`.
        held: bytes that the training holds beside a step, see `spend_memory`.
    """
    batch, *shape = input_shape
    dtype, budget = DTYPES.get(str(precision)), int(HEADROOM * memory) - held
    line = (
        f"out of memory at a batch of {batch} images of shape {tuple(shape)}: there are {memory / 1e6:,.0f} MB in all"
    )
    if hasattr(network, "log_prob") or any(isinstance(module, FSDPModule) for module in network.modules()):
        # An estimate gives no labels to a flow that needs them, and does not see what is shared out among devices.
        return f"{line}; try a smaller data.batch_size"
    try:
        taken = estimate(network, input_shape, dtype=dtype, optimizer=optimizer).total
        line += f", and the training takes {(taken + held) / 1e6:,.0f} MB"
        if taken <= budget:
            return f"{line}: something else holds the rest; end it, or try a smaller data.batch_size"
        largest = max_batch(network, shape, budget, dtype=dtype, optimizer=optimizer)
        remedies = [f"data.batch_size={largest} or less fits"]
    except ValueError as error:  # not even one image fits, or the network cannot be estimated
        return f"{line}: {error}"
    try:
        planned = plan(network, input_shape, budget, dtype=dtype, optimizer=optimizer)
    except ValueError:  # no sequence, or no plan fits
        pass
    else:
        cost = f"{planned.memory.total / 1e6:,.0f} MB, {planned.seconds_over_store:.2f} times the time of storing"
        remedies.append(f"memory_budget={(budget + held) // 10**6}MB keeps this batch ({cost})")
    return f"{line}: {', and '.join(remedies)}"


def memory_of(device: torch.device) -> int:
    """Bytes that a process may have on a device.

    Of a GPU those that are free or already this process's; else the least of the machine's, of the process's limit and
    of the limits of its control groups, such as a container's or a job's.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if sys.platform == "win32":
        return 2**63 - 1  # the system does not tell
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *([] if limit == resource.RLIM_INFINITY else [limit]), *_limits_of_groups()])


def _limits_of_groups() -> Iterator[int]:
    """Of memory, in bytes; a group's holds for every group in it, and a container may see its own as the root."""
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CONTROL_GROUPS / "memory" if controllers else CONTROL_GROUPS
        group = root / path.lstrip("/")
        for directory in (group, *group.parents[: len(group.relative_to(root).parts)]):
            limit = directory / ("memory.limit_in_bytes" if controllers else "memory.max")
            if limit.exists() and (text := limit.read_text().strip()) != "max":
                yield int(text)
