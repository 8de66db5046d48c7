"""Whether autocast is on, and how it was when a branch was first evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

__all__ = ["Autocast", "has_autocast", "is_autocast_on"]


def has_autocast(kind: str) -> bool:
    """Whether this kind of device knows autocast."""
    # The compiler of torch 2.11 cannot look into `is_autocast_available`; what it compiles for has autocast.
    return kind != "meta" and (torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind))


def is_autocast_on(kind: str) -> bool:
    """Whether autocast is on for this kind of device."""
    return has_autocast(kind) and torch.is_autocast_enabled(kind)


@dataclass(frozen=True, slots=True)
class Autocast:
    """The autocast state in force when the first evaluation ran."""

    settings: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def current(cls, device: torch.device) -> Autocast:
        kinds = [k for k in dict.fromkeys(("cpu", device.type)) if has_autocast(k)]
        return cls(tuple((k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds))

    @property
    def enabled(self) -> bool:
        return any(enabled for _, enabled, _ in self.settings)

    def to_restore(self) -> Autocast | None:
        """Itself; None where autocast is off now as it was then, so that nothing has to be restored."""
        off = not self.enabled and not any(torch.is_autocast_enabled(kind) for kind, _, _ in self.settings)
        return None if off else self

    @contextmanager
    def restored(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, enabled, dtype in self.settings:
                cached = not self.enabled  # as in the first evaluation: see ReversibleSequence
                stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=cached))
            yield
