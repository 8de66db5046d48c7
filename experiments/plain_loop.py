"""A RevNet as a person would write it without the engine, in ordinary autograd or under torch's checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revnet import AdditiveCoupling, ReversibleBlock
from revnet.models import RevNet
from revnet.models.units import TransitionUnit
from revnet.reversible import Split, split_halves

__all__ = ["PlainLoop", "plain_block"]


def plain_block(block: ReversibleBlock, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """A reversible block as a person would write it."""
    y1 = x1 + block.f(x2)
    return y1, x2 + block.g(y1)


def unit(layers: list[nn.Module], state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """One unit as a person would write it: a block, or the transition and the coupling that is its other half."""
    if isinstance(layers[0], ReversibleBlock):
        return plain_block(layers[0], *state)
    transition, coupling = layers
    assert isinstance(transition, TransitionUnit)
    assert isinstance(coupling, AdditiveCoupling)
    x1, x2 = split_halves(state[0])
    y1 = transition.shortcut1(x1) + transition.f(x2)
    return y1.float(), (transition.shortcut2(x2) + coupling.branch(y1)).float()


class PlainLoop(nn.Module):
    """The network without the engine: ordinary autograd, or torch's checkpoint around every unit.

    Under autocast the residual stream is fp32, as in the engine.
    """

    def __init__(self, network: RevNet, checkpointed: bool) -> None:
        super().__init__()
        self.network, self.checkpointed = network, checkpointed

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self.checkpointed:
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def forward(self, x: Tensor) -> Tensor:
        net = self.network
        x = self.run(lambda x: net.maxpool(net.relu(net.bn1(net.conv1(x)))).float(), x)
        for name in net.stage_names:
            first, second, *blocks = list(net.get_submodule(name).children())[:-1]  # all but the Merge
            if isinstance(first, Split):
                state, blocks = first(x), [second, *blocks]
            else:
                state = self.run(unit, [first, second], (x,))
            x = self.run_blocks(name, blocks, state)
        x = self.run(lambda x: net.avgpool(net.relu(net.norm(x))), x)
        return net.fc(x.flatten(1))

    def run_blocks(self, stage: str, blocks: Sequence[nn.Module], state: tuple[Tensor, ...]) -> Tensor:
        """The output of a stage from the halves behind its transition."""
        for block in blocks:
            state = self.run(unit, [block], state)
        return torch.cat(state, 1)
