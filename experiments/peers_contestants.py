"""The contestants of `peers.py`: the same branches in a plain loop, in our sequences, in MemCNN and in RevTorch."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from plain_loop import plain_block
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from revnet import ReversibleBlock, ReversibleSequence
from revnet.reversible import Merge, Split, split_halves

__all__ = [
    "CHECKPOINT",
    "EXACT",
    "FORWARD",
    "LOOP",
    "NARROW",
    "REVERSAL",
    "Contestant",
    "HandWritten",
    "Reversal",
    "contestants",
    "ours",
]

LOOP, CHECKPOINT, EXACT, FORWARD = "plain loop", "torch.utils.checkpoint", "reconstruct, exact", "forward alone"
REVERSAL = "hand-written reversal"
NARROW = ", bf16 stream"


@dataclass
class Contestant:
    """A module from a whole tensor to a whole tensor.

    Attributes:
        blocks: the blocks whose branches it evaluates.
        autocast: whether autocast is on around the whole module.
        stream: dtype of the tensor that it is given.
        output: dtype of the tensor that it returned.
    """

    module: nn.Module
    blocks: list[ReversibleBlock]
    autocast: bool = False
    stream: torch.dtype = torch.float32
    output: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            y = self.module(x.to(self.stream, copy=True))
        self.output = y.dtype
        return y

    def step(self, x: Tensor, cotangent: Tensor) -> None:
        (self.forward(x) * cotangent).sum().backward()

    def parameters(self) -> list[nn.Parameter]:
        return [p for block in self.blocks for p in block.parameters()]

    def clear(self, x: Tensor) -> None:
        for tensor in (x, *self.parameters()):
            tensor.grad = None


class Loop(nn.Module):
    """The blocks without the engine: ordinary autograd, or torch's checkpoint around every block."""

    def __init__(self, blocks: Iterable[ReversibleBlock], checkpointed: bool) -> None:
        super().__init__()
        self.layers, self.checkpointed = nn.ModuleList(blocks), checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = split_halves(x)
        for block in self.layers:
            assert isinstance(block, ReversibleBlock)
            if self.checkpointed:
                x1, x2 = checkpoint(plain_block, block, x1, x2, use_reentrant=False)
            else:
                x1, x2 = plain_block(block, x1, x2)
        return torch.cat((x1, x2), 1)


class HandWritten(torch.autograd.Function):
    """The least that reversing blocks takes: no replay of random numbers or statistics, no check, no drift."""

    @staticmethod
    def forward(ctx: Any, branches: list[nn.Module], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.branches, ctx.parameters, ctx.kind = branches, parameters, x.device.type
        ctx.autocast = torch.is_autocast_enabled(ctx.kind)
        moved, other = split_halves(x)
        for branch in branches:
            moved, other = other, moved + branch(other)
        y = torch.cat((moved, other), 1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (other, moved), (grad_other, grad_moved) = split_halves(ctx.saved_tensors[0]), split_halves(grad)
        del grad
        sums: dict[Tensor, Tensor] = {}
        for branch in reversed(ctx.branches):
            leaf, own = other.detach().requires_grad_(), list(branch.parameters())
            with torch.enable_grad(), torch.autocast(ctx.kind, torch.bfloat16, ctx.autocast, cache_enabled=False):
                h = branch(leaf)
            moved.sub_(h.detach())
            edge, cotangent = get_gradient_edge(h), grad_moved.to(h.dtype)
            del h
            found, *of_parameters = torch.autograd.grad(edge, [leaf, *own], cotangent)
            sums.update(zip(own, of_parameters, strict=True))
            grad_other = grad_other + found
            moved, other, grad_moved, grad_other = other, moved, grad_other, grad_moved
        return None, torch.cat((grad_other, grad_moved), 1), *map(sums.get, ctx.parameters)


class Reversal(nn.Module):
    """The blocks under a function that reverses them."""

    def __init__(self, blocks: Iterable[ReversibleBlock], function: type[HandWritten] = HandWritten) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleList(blocks), function

    def forward(self, x: Tensor) -> Tensor:
        branches = [branch for block in self.layers for branch in (block.f, block.g)]
        y: Tensor = self.function.apply(branches, x, *self.parameters())
        return y


class Autocast(nn.Module):
    """A branch that runs under bf16 autocast wherever it is called from."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        # Without the weight cache: a copy cached without gradients would be used again where they are needed.
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            return self.branch(x)


def library(name: str) -> Any:
    try:
        with warnings.catch_warnings():  # MemCNN calls what is deprecated, and silences warnings of the whole program
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SystemExit(f"{name} is missing: pip install -e '.[bench]'") from error


def ours(blocks: Iterable[nn.Module], activations: str, exact: bool = False) -> ReversibleSequence:
    sequence = ReversibleSequence([Split(), *blocks, Merge()], activations, exact=exact)
    sequence.watch.raise_above = math.inf  # the error is recorded
    return sequence


def contestants(blocks: list[ReversibleBlock], bf16: bool) -> dict[str, Contestant]:
    """All that take part, over the same branches."""
    memcnn, revtorch = library("memcnn"), library("revtorch")

    def pairs() -> list[tuple[nn.Module, nn.Module]]:
        return [(Autocast(b.f), Autocast(b.g)) if bf16 else (b.f, b.g) for b in blocks]

    def of_memcnn() -> nn.Module:
        couplings = [memcnn.AdditiveCoupling(f, g) for f, g in pairs()]
        return nn.Sequential(*[memcnn.InvertibleModuleWrapper(c, keep_input=False) for c in couplings])

    def of_revtorch() -> nn.Module:
        return revtorch.ReversibleSequence(nn.ModuleList([revtorch.ReversibleBlock(f, g) for f, g in pairs()]))

    found = {
        LOOP: Contestant(Loop(blocks, False), blocks, bf16),
        "store": Contestant(ours(blocks, "store"), blocks, bf16),
        CHECKPOINT: Contestant(Loop(blocks, True), blocks, bf16),
        REVERSAL: Contestant(Reversal(blocks), blocks, bf16),
        "recompute": Contestant(ours(blocks, "recompute"), blocks, bf16),
        "reconstruct": Contestant(ours(blocks, "reconstruct"), blocks, bf16),
        EXACT: Contestant(ours(blocks, "reconstruct", exact=True), blocks, bf16),
        "MemCNN": Contestant(of_memcnn(), blocks),
        "RevTorch": Contestant(of_revtorch(), blocks),
        FORWARD: Contestant(ours(blocks, "store"), blocks, bf16),
    }
    if bf16:  # our sequence keeps a stream of bf16 where autocast is on in its branches alone
        narrow = [ReversibleBlock(f, g) for f, g in pairs()]
        modules = {"reconstruct": ours(narrow, "reconstruct"), "MemCNN": of_memcnn(), "RevTorch": of_revtorch()}
        found |= {name + NARROW: Contestant(m, blocks, stream=torch.bfloat16) for name, m in modules.items()}
    return found
