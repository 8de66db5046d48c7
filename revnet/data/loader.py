"""A loader whose processes outlive a signal to the training, and not the program."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import weakref
from typing import Any

from torch.utils.data import DataLoader

from revnet.data.datasets import Batch

__all__ = ["Loader", "leave_signals_to_the_trainer"]

_ITERATORS: weakref.WeakSet[Any] = weakref.WeakSet()
_PROCESSES: weakref.WeakSet[Any] = weakref.WeakSet()  # theirs, which may outlive them


class Loader(DataLoader[Batch]):
    """One whose processes, if they are still there, end when Python does.

    Python would send them the signal that `leave_signals_to_the_trainer` lets them ignore, and wait for ever.
    """

    def _get_iterator(self) -> Any:
        iterator = super()._get_iterator()
        if self.num_workers > 0:
            _ITERATORS.add(iterator)
            _PROCESSES.update(iterator._workers)  # type: ignore[attr-defined]
        return iterator


def leave_signals_to_the_trainer(worker: int) -> None:
    """Let a loader's process live on when a signal to stop reaches all processes of a run: the trainer ends it."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # not every system has the last
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@atexit.register
def _end_processes() -> None:
    for iterator in list(_ITERATORS):
        iterator._shutdown_workers()
    for process in multiprocessing.active_children():
        if process in _PROCESSES:  # it was too slow to be told, and hears of nothing else
            process.kill()
