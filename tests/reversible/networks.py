"""Small branches and sequences that the engine's tests share."""

import pytest
import torch
from torch import nn

from revnet import ReversibleBlock, ReversibleSequence
from revnet.reversible import Merge, Split

VALUES = ("store", "recompute", "reconstruct")

# The ways to have gradients without keeping activations. What is promised holds in each.
MODES = pytest.mark.parametrize(
    ("activations", "exact"),
    [(activations, exact) for activations in VALUES[1:] for exact in (False, True)],
    ids=["recompute", "recompute-exact", "reconstruct", "reconstruct-exact"],
)
EVERY = pytest.mark.parametrize("activations", VALUES)
EXACT = pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


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


def convolution(rank, inputs, outputs, size=3, bias=False):
    """Over `rank` dimensions behind the channels; over none a linear layer."""
    if rank == 0:
        return nn.Linear(inputs, outputs, bias)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    return kind(inputs, outputs, size, padding=size // 2, bias=bias)


def batch_norm(rank, channels):
    return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank](channels)


def basic(channels, rank=2):
    return nn.Sequential(
        batch_norm(rank, channels),
        nn.ReLU(inplace=True),
        convolution(rank, channels, channels),
        batch_norm(rank, channels),
        nn.ReLU(inplace=True),
        convolution(rank, channels, channels),
    )


def bottleneck(channels, rank=2):
    inner = max(1, channels // 4)
    return nn.Sequential(
        batch_norm(rank, channels),
        nn.ReLU(),
        convolution(rank, channels, inner, 1),
        batch_norm(rank, inner),
        nn.ReLU(),
        convolution(rank, inner, channels, 1),
    )


def groupnorm(channels, rank=2):
    return nn.Sequential(nn.GroupNorm(1, channels), nn.GELU(), convolution(rank, channels, channels, bias=True))


def layernorm(channels, rank=2):
    return nn.Sequential(LayerNorm(channels), nn.GELU(), convolution(rank, channels, channels, bias=True))


def postnorm(channels, rank=2):
    """Its gradient meets the normalisation first, whose sums depend on the layout of what they are given."""
    return nn.Sequential(convolution(rank, channels, channels), batch_norm(rank, channels))


class LayerNorm(nn.LayerNorm):
    """Over the channels of every position, dimension 1."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def tokens(channels, rank=0):
    """For channels in the last dimension."""
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.GELU())


def dropout(channels, rank=2, inner=basic):
    return nn.Sequential(inner(channels, rank), nn.Dropout(0.3))


def droppath(channels, rank=2, inner=basic):
    return nn.Sequential(inner(channels, rank), DropPath(0.3))


def curved(channels, rank=2):
    """Without kinks, for derivatives of any order."""
    return nn.Sequential(convolution(rank, channels, channels, 1, bias=True), nn.Tanh())


BRANCHES = {f.__name__: f for f in (basic, bottleneck, postnorm, dropout, droppath, groupnorm, layernorm)}


class Transition(nn.Module):
    """A layer without an inverse, from halves to halves."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x1, x2):
        return self.conv(x1).relu(), self.conv(x2).relu()


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
