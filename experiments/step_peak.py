"""The peak of a training step of any library, in bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from revnet.profiling import MemoryTimeline

__all__ = ["peak_of"]


class ResizeTimeline(MemoryTimeline):
    """Sees also what is resized in place: MemCNN frees the inputs of its blocks so."""

    def __enter__(self) -> Any:
        resize = torch.UntypedStorage.resize_

        def resize_and_note(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            number = self._numbers.get(storage._cdata, (None,))[0]
            if number is not None:
                self._events.append((number, size - self._sizes[number]))
                self._sizes[number] = size
            return result

        self._patch = patch.object(torch.UntypedStorage, "resize_", resize_and_note)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patch.stop()
        super().__exit__(*error)


def peak_of(step: Callable[[], Any], x: Tensor, module: nn.Module) -> int:
    """Most bytes live at once in a step, but for the gradients of the parameters, which are None before it."""
    parameters = list(module.parameters())
    if x.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - sum(p.grad.nbytes for p in parameters if p.grad is not None)
    with ResizeTimeline([*parameters, *module.buffers(), x]) as timeline:
        step()
    return timeline.peak(without=[p.grad for p in parameters if p.grad is not None])
