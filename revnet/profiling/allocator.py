"""The allocators: settings under which times on a CPU can be compared, and what the one of CUDA took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["KEEP_FREED_MEMORY", "Allocator", "recorded"]

# Environment of a process whose glibc keeps what was freed. Otherwise it gives large blocks back to the system and
# faults them in again at the next step, which makes whatever stores much look slow.
KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_MMAP_THRESHOLD_": "17179869184"}


class Allocator:
    """The most bytes that the CUDA allocator had handed out, beyond those at the time this object was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = torch.cuda.memory_allocated(device)
        self.reset()

    def reset(self) -> None:
        """From now on `most` tells of what comes."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def most(self) -> int:
        """The most bytes since `reset`."""
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self.before


@contextmanager
def recorded(path: str | Path | None) -> Iterator[None]:
    """Writes the history of the allocator inside, as pytorch.org/memory_viz reads it; nothing for None."""
    if path is None:
        yield
        return
    torch.cuda.memory._record_memory_history()
    try:
        yield
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
