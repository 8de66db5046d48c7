"""The steps that a layer takes, noted while it runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:  # they look here
    from revnet.reversible.coupling import Step
    from revnet.reversible.evaluation import Evaluation

__all__ = ["Tape", "recording", "suspended", "tape_of"]


@dataclass
class Tape:
    """The steps of a layer, in order, with the `Evaluation` of each one's branch.

    `sampling`: with a sample of the branch's result.
    """

    layer: nn.Module
    sampling: bool
    steps: list[tuple[Step, Evaluation]] = field(default_factory=list)


class _Local(threading.local):
    """Per thread, because backward passes on an accelerator run in a thread of their own."""

    tape: Tape | None = None


_local = _Local()


def tape_of(layer: nn.Module) -> Tape | None:
    """Where to note the steps of a layer, if they are to be noted.

    Other layers may run inside of it, too, in a hook of the layer.
    """
    tape = _local.tape
    return tape if tape is not None and tape.layer is layer else None


@contextmanager
def recording(layer: nn.Module, sampling: bool = False) -> Iterator[list[tuple[Step, Evaluation]]]:
    """Collects the steps that `layer` takes inside."""
    outer, tape = _local.tape, Tape(layer, sampling)
    _local.tape = tape
    try:
        yield tape.steps
    finally:
        _local.tape = outer


@contextmanager
def suspended() -> Iterator[None]:
    """Notes nothing inside, of a branch or of what else a layer calls."""
    tape, _local.tape = _local.tape, None
    try:
        yield
    finally:
        _local.tape = tape
