"""Small branches and sequences that the engine's tests share."""

import pytest
import torch
from torch import nn

from revnet import ReversibleBlock, ReversibleSequence
from revnet.reversible import Merge, Split

# The ways to have gradients without keeping activations. What is promised holds in each.
MODES = pytest.mark.parametrize(
    ("activations", "exact"),
    [(activations, exact) for activations in ("recompute", "reconstruct") for exact in (False, True)],
    ids=["recompute", "recompute-exact", "reconstruct", "reconstruct-exact"],
)


class DropPath(nn.Module):
    """Drops the whole residual of some samples."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * keep.to(x.dtype) / (1 - self.rate)


def basic(channels):
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
    )


def bottleneck(channels):
    inner = max(1, channels // 4)
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, inner, 1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(),
        nn.Conv2d(inner, channels, 1, bias=False),
    )


def dropout(channels):
    return nn.Sequential(basic(channels), nn.Dropout(0.3))


def droppath(channels):
    return nn.Sequential(basic(channels), DropPath(0.3))


def groupnorm(channels):
    return nn.Sequential(nn.GroupNorm(1, channels), nn.GELU(), nn.Conv2d(channels, channels, 3, padding=1))


def layernorm(channels):
    """For tokens (B, N, C)."""
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.GELU())


BRANCHES = {f.__name__: f for f in (basic, bottleneck, dropout, droppath, groupnorm)}


def blocks(depth, channels, branch=basic, dtype=torch.float64):
    """`depth` reversible blocks on halves of `channels` channels, with the same weights at every call."""
    with torch.random.fork_rng([]):
        torch.manual_seed(17)
        return [ReversibleBlock(branch(channels), branch(channels)).to(dtype) for _ in range(depth)]


def sequence(activations, depth=4, channels=4, branch=basic, dtype=torch.float64, dim=1, exact=None):
    """One tensor in, one tensor out."""
    return ReversibleSequence([Split(dim), *blocks(depth, channels, branch, dtype), Merge(dim)], activations, exact)


def step(module, x, seed=5, loss=lambda y: y.square().mean(), **kwargs):
    """Output, gradients of the input and of every parameter after one seeded training step."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    torch.manual_seed(seed)
    y = module(x, **kwargs)
    loss(y).backward()
    return y, [x.grad, *(p.grad for p in module.parameters())]


def relative(found, truth):
    """||found - truth|| / ||truth|| over whole lists of gradients."""
    found, truth = (torch.cat([g.flatten().double() for g in gs]) for gs in (found, truth))
    return ((found - truth).norm() / truth.norm()).item()


def same(found, truth, exact):
    """Whether gradients are those of store: to the bit in exact mode, to the rounding of float64 otherwise."""
    assert [g is None for g in found] == [g is None for g in truth]
    found, truth = ([g for g in gs if g is not None] for gs in (found, truth))
    return all(map(torch.equal, found, truth)) if exact else relative(found, truth) <= 1e-10
