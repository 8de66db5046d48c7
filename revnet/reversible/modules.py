"""What a branch or layer is made of."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

__all__ = ["modules_in", "parameters_of"]


def modules_in(module: nn.Module) -> list[nn.Module]:
    """`list(module.modules())` in another order, at a tenth of the time: it is asked for at every evaluation."""
    found, seen = [module], {module}
    for known in found:
        for child in known._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def parameters_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a module itself holds that may get a gradient: its parameters, and buffers that require grad."""
    yield from ((name, p) for name, p in module._parameters.items() if p is not None)
    yield from ((name, b) for name, b in module._buffers.items() if b is not None and b.requires_grad)
