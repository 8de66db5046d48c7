"""One training step of any module, and the module as it was before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Loss", "MakeOptimizer", "build_optimizer", "check_device", "loss_of", "mean_square", "unchanged"]

Loss = Callable[[Any], Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def mean_square(output: Any) -> Tensor:
    """Sum over the floating-point tensors of the output of the mean of their squares: the loss where none is given."""
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    if not tensors:
        raise ValueError("the model returned no floating-point tensor; pass `loss`, a function from output to scalar")
    return torch.stack([t.float().square().mean() for t in tensors]).sum()


def loss_of(model: nn.Module, input: Tensor, loss: Loss, dtype: torch.dtype | None) -> Tensor:
    """The loss of a batch, under autocast to `dtype`: what a training step calls `backward` on."""
    with torch.enable_grad(), _autocast(model, input, dtype):
        value = loss(model(input))
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return a scalar tensor, got {found}; take its mean")
    if not value.requires_grad:
        raise ValueError(
            "the loss depends on no parameter that requires grad, so there is no backward pass; "
            "unfreeze the model or pass a `loss` that depends on it"
        )
    return value


def _autocast(model: nn.Module, input: Tensor, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    if dtype is None or {p.dtype for p in model.parameters() if p.is_floating_point()} == {dtype}:
        return nullcontext()
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"dtype must be torch.bfloat16 or torch.float16 (autocast), or None for the dtype of the parameters; got "
            f"{dtype}; convert the model instead"
        )
    return torch.autocast(input.device.type, dtype=dtype)


def build_optimizer(model: nn.Module, optimizer: MakeOptimizer | None) -> torch.optim.Optimizer | None:
    """The optimizer of the model's parameters, None for None."""
    if optimizer is None:
        return None
    built = None if isinstance(optimizer, torch.optim.Optimizer) else optimizer(model.parameters())
    if not isinstance(built, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a function from parameters to a torch.optim.Optimizer, got {optimizer!r}; for example "
            f"functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)"
        )
    return built


def check_device(model: nn.Module, input: Tensor) -> None:
    """ValueError where model and input are on different devices."""
    devices = {p.device for p in model.parameters()}
    if devices and input.device not in devices:
        raise ValueError(
            f"input is on {input.device}, the model on {', '.join(sorted(map(str, devices)))}; move one of them"
        )


@contextmanager
def unchanged(model: nn.Module, input: Tensor) -> Iterator[None]:
    """Gives back parameters, buffers, plain attributes and random generators; gradients are cleared around.

    Those of buffers and of the input are given back, too.
    """
    values = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers()) if not _is_expanded(t)]
    gradients = [(t, t.grad) for t in (*model.buffers(), input) if t.is_leaf]
    buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    # A layer may have noted that it has seen its first batch, say.
    plain = [
        (vars(module), {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str | None)})
        for module in model.modules()
    ]
    device = input.device
    devices, kind = ([], "cuda") if device.type in ("cpu", "meta") else ([device], device.type)
    with torch.random.fork_rng(devices, device_type=kind):
        model.zero_grad()
        for tensor, _ in gradients:
            tensor.grad = None
        try:
            yield
        finally:
            model.zero_grad()
            for tensor, gradient in gradients:
                tensor.grad = gradient
            with torch.no_grad():
                for tensor, value in values:
                    tensor.copy_(value)
                for slots, before in buffers:
                    slots.clear()
                    slots.update(before)
                for attributes, values_before in plain:
                    attributes.update({name: value for name, value in values_before.items() if name in attributes})


def _is_expanded(t: Tensor) -> bool:
    """Whether several elements have one place in memory, so that nothing can be written there."""
    return t.layout is torch.strided and any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape, strict=True))
