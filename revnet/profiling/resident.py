"""The resident set of a process that runs one training step: what the operating system saw of it."""

from __future__ import annotations

import ctypes
import gc
import pickle
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

from revnet.profiling.step import Loss, MakeOptimizer, build_optimizer, loss_of, mean_square

__all__ = ["measure_resident"]

SELF = Path("/proc/self")
# Constants of glibc's mallopt: blocks of 64 KiB and more are given back to the system as soon as they are freed.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGE = 64 * 1024


def measure_resident(
    model: nn.Module | Callable[[], nn.Module],
    input: Tensor,
    loss: Loss = mean_square,
    dtype: torch.dtype | None = None,
    optimizer: MakeOptimizer | None = None,
) -> int:
    """By how many bytes a training step raises the peak resident set of a fresh process: a check on a CPU's `Memory`.

    To be compared with `total - parameters - optimizer - input` of `Memory`: these exist before the step. What
    `Memory` does not see (workspaces of convolutions, code that libraries generate) is in it, so small steps seem
    large: take one of hundreds of MB. The process starts as `multiprocessing` starts them: a script that calls this
    needs `if __name__ == "__main__":`.

    Args:
        model: a module, or a function without arguments that builds one in the new process.
        input, loss, dtype, optimizer: as for `measure_memory`. All are pickled, so functions are those of a module
            or `functools.partial` of them.

    Raises:
        ValueError: the input is not on a CPU, or the system is not Linux.
        TypeError: something cannot be pickled.
    """
    if input.device.type != "cpu":
        raise ValueError(f"input is on {input.device}: the resident set tells of CPUs alone; use measure_memory there")
    if sys.platform != "linux":
        raise ValueError(
            f"the resident set is read from Linux's /proc, the system is {sys.platform}; use measure_memory"
        )
    try:
        step = pickle.dumps((model, input, loss, dtype, optimizer))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"model, loss and optimizer must be picklable for measure_resident ({error}); define functions and classes "
            f"at the top of a module, or pass functools.partial of one"
        ) from error
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_rise, step, torch.get_num_threads()).result()


def _rise(pickled: bytes, threads: int) -> int:
    """Runs in the fresh process."""
    _give_memory_back()
    torch.set_num_threads(threads)
    model, input, loss, dtype, optimizer = pickle.loads(pickled)
    if not isinstance(model, nn.Module):
        model = model()
    stepper = build_optimizer(model, optimizer)

    def step(batch: Tensor) -> None:
        loss_of(model, batch, loss, dtype).backward()
        if stepper is not None:
            stepper.step()
        model.zero_grad()

    try:  # loads libraries, starts threads, creates the optimizer's state
        step(input[:2])
    except (RuntimeError, ValueError):  # a loss that holds the labels of the batch wants all of it
        step(input)
    gc.collect()
    with suppress(OSError):  # where it is not permitted, the peak is that of the process so far
        (SELF / "clear_refs").write_text("5")
    before = _status("VmRSS")
    step(input)
    return _status("VmHWM") - before


def _give_memory_back() -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        for option, value in ((M_MMAP_THRESHOLD, LARGE), (M_TRIM_THRESHOLD, LARGE), (M_TOP_PAD, 0)):
            mallopt(option, value)


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB$", (SELF / "status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{SELF / 'status'} has no line {field}")
    return 1024 * int(found[1])
