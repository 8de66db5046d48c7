"""The memory that tensors take over time, event by event."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["MemoryTimeline", "storages"]


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """Where the data of a tensor is: indices and values for a sparse one."""
    parts = (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)
    return [part.untyped_storage() for part in parts]


class MemoryTimeline(TorchDispatchMode):
    """Records the birth and death of every storage that an operator returns while the mode is on.

    From the record follow the live bytes at any moment and their peak, with any set of tensors left out afterwards: it
    is only known after a backward pass which storages became gradients. Storage that an operator allocates and frees
    inside itself (a convolution's workspace) is not seen.

    Args:
        known: tensors that exist already and do not count (parameters, buffers, inputs).

    Example:
        >>> import torch
        >>> from revnet.profiling import MemoryTimeline
        >>> x = torch.ones(256)
        >>> with MemoryTimeline(known=[x]) as timeline:
        ...     y = (x + 1) * 2
        >>> timeline.peak(), timeline.live()
        (2048, 1024)
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._sizes: list[int] = []
        self._events: list[tuple[int, int]] = []  # (number of the storage, change in bytes)
        self._numbers: dict[int, tuple[int | None, weakref.ref[torch.UntypedStorage]]] = {}
        for tensor in known:
            self._see(tensor, counts=False)

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        pytree.tree_map_only(Tensor, self._see, result)
        return result

    def _see(self, tensor: Tensor, counts: bool = True) -> None:
        for storage in storages(tensor):
            if storage._cdata not in self._numbers:
                self._note(storage, counts)

    def _note(self, storage: torch.UntypedStorage, counts: bool) -> None:
        key, number = storage._cdata, None
        if counts:
            number, size = len(self._sizes), storage.nbytes()
            self._sizes.append(size)
            self._events.append((number, size))
        self._numbers[key] = number, weakref.ref(storage, lambda _: self._forget(key))

    def _forget(self, key: int) -> None:
        number, _ = self._numbers.pop(key)
        if number is not None:
            self._events.append((number, -self._sizes[number]))

    def now(self) -> int:
        """The present moment, to be given to the other methods later."""
        return len(self._events)

    def bytes_over_time(self, without: Iterable[Tensor] = ()) -> list[int]:
        """Live bytes after each event, the storages of `without` left out."""
        left_out, total, curve = self.numbers_of(without), 0, []
        for number, change in self._events:
            if number not in left_out:
                total += change
            curve.append(total)
        return curve

    def live(self, moment: int | None = None, without: Iterable[Tensor] = ()) -> int:
        """The bytes live at `moment` (one that `now` returned), or at the end."""
        curve = self.bytes_over_time(without)[:moment]
        return curve[-1] if curve else 0

    def peak(self, without: Iterable[Tensor] = (), since: int = 0, until: int | None = None) -> int:
        """The most bytes that were live at once, from one moment to another."""
        curve = [0, *self.bytes_over_time(without)]  # a moment's bytes are those after the event before it
        return max(curve[since:][: None if until is None else until - since + 1])

    def peak_parts(self, moment: int, until: int | None = None, without: Iterable[Tensor] = ()) -> tuple[int, int]:
        """The peak until the moment `until` in two parts: the storages that were live at `moment` too, and the rest."""
        curve = [0, *self.bytes_over_time(without)][: None if until is None else until + 1]
        highest = max(curve)
        both = self.alive(moment).keys() & self.alive(curve.index(highest)).keys()
        of_moment = sum(self._sizes[number] for number in both - self.numbers_of(without))
        return of_moment, highest - of_moment

    def alive(self, moment: int) -> dict[int, tuple[int, int]]:
        """The storages live at `moment`, by number: when each was born, and its bytes."""
        alive: dict[int, tuple[int, int]] = {}
        for event, (number, change) in enumerate(self._events[:moment]):
            if change > 0:
                alive[number] = event, change
            else:
                alive.pop(number, None)
        return alive

    def numbers_of(self, tensors: Iterable[Tensor]) -> set[int | None]:
        """The numbers of the storages of tensors; None for one that does not count."""
        keys = [storage._cdata for t in tensors for storage in storages(t)]
        return {self._numbers[key][0] for key in keys if key in self._numbers}
