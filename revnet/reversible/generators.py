"""States of torch's random generators: taken before a first evaluation, put back for a second one."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

__all__ = ["random_replayed", "random_states"]


class _Local(threading.local):
    """Per thread, because backward passes on an accelerator run in a thread of their own."""

    states: tuple[Tensor, ...] = ()


_local = _Local()


def _has_generator(device: torch.device) -> bool:
    """Whether the device draws from a generator of its own: accelerators do, meta has none."""
    return device.type not in ("cpu", "meta")


def random_states(device: torch.device) -> tuple[Tensor, ...]:
    """States of the random generators: the tuple returned before while they are the same, so that one copy is kept."""
    states = [torch.get_rng_state()]
    if _has_generator(device):
        states.append(torch.get_device_module(device).get_rng_state(device))
    if not _equal(states, _local.states):
        _local.states = tuple(states)
    return _local.states


def _equal(states: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    with torch._C._DisableTorchDispatch():  # the states are real even where fake tensors are computed with
        return len(states) == len(others) and all(map(torch.equal, states, others))


@contextmanager
def random_replayed(
    states: tuple[Tensor, ...], device: torch.device, inner: AbstractContextManager[None]
) -> Iterator[None]:
    """The generators in these states inside, and behind it in those of before; `inner` is entered too."""
    now = random_states(device)
    if now is not states and not _equal(now, states):  # in another thread than the forward pass they are never the same
        _set_random_states(states, device)
    try:
        with inner:
            yield
    finally:
        _set_random_states(now, device)


def _set_random_states(states: tuple[Tensor, ...], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], device)
