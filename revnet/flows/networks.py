"""The coupling networks of NICE and RealNVP.

None of them normalises over the batch: a branch would then give an example another density in other company.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from revnet.flows.finite import has_values

__all__ = ["MLP", "ClassEmbedding", "ResidualNetwork", "ScaleAndShift"]


_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class ClassEmbedding(nn.Embedding):
    """A learnt vector of size `size` for each of `classes` labels: the condition of a flow on images of classes.

    Raises:
        ValueError: no class; labels that are no whole numbers from 0 up to `classes` - 1, one for each example.

    Example:
        >>> import torch
        >>> from revnet.flows import ClassEmbedding
        >>> ClassEmbedding(10, size=4)(torch.tensor([3, 1])).shape
        torch.Size([2, 4])
    """

    def __init__(self, classes: int, size: int = 64) -> None:
        if classes < 1:
            raise ValueError(f"classes={classes}: give the number of classes, at least 1, or None for no condition")
        super().__init__(classes, size)

    def forward(self, input: Tensor) -> Tensor:
        whole = isinstance(input, Tensor) and input.ndim == 1 and input.dtype in _WHOLE
        if not whole or (has_values(input) and not bool(((input >= 0) & (input < self.num_embeddings)).all())):
            raise ValueError(
                f"context: give the label of each example, a tensor of shape (B,) of whole numbers from 0 to "
                f"{self.num_embeddings - 1}; got {input!r}"
            )
        return super().forward(input.long())


def _condition(network: nn.Module, layer: nn.Linear | None, context: Tensor | None) -> Tensor | float:
    """What a condition adds to the first features of a network."""
    if layer is None:
        if context is not None:
            raise ValueError(
                f"context: {type(network).__name__} was built without a condition; build the flow with `classes`, or "
                f"leave the context out"
            )
        return 0.0
    if context is None:
        raise ValueError(f"context: {type(network).__name__} was built with a condition; give it one for every example")
    return layer(context)


class MLP(nn.Module):
    """`layers` hidden layers of `hidden` ReLU units and a linear one.

    Source: Dinh, Krueger, Bengio 2014 (NICE), section 5.1.

    Args:
        inputs, outputs: components before and after.
        hidden, layers: width and number of the hidden layers, at least one.
        condition: size of the condition vector; 0 for none.

    Raises:
        ValueError: no hidden layer or unit; in the forward pass, a condition that is missing or one too many.

    Example:
        >>> import torch
        >>> from revnet.flows import MLP
        >>> MLP(4, 6, hidden=16, layers=2)(torch.randn(3, 4)).shape
        torch.Size([3, 6])
    """

    def __init__(self, inputs: int, outputs: int, hidden: int, layers: int, condition: int = 0) -> None:
        super().__init__()
        if hidden < 1 or layers < 1:
            raise ValueError(f"hidden={hidden}, layers={layers}: give at least one hidden layer of at least one unit")
        self.first = nn.Linear(inputs, hidden)
        self.condition = nn.Linear(condition, hidden, bias=False) if condition else None
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.last = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = relu(self.first(x) + _condition(self, self.condition, context))
        for layer in self.hidden:
            x = relu(layer(x))
        return self.last(x)


def _norm(width: int) -> nn.GroupNorm:
    """Of the features of one example: for the convolutions what batch normalisation is in the paper."""
    return nn.GroupNorm(max(1, width // 8) if width % 8 == 0 else 1, width)


class _ResidualBlock(nn.Module):
    """x + (normalisation, ReLU, 3x3 convolution) twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = _norm(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = _norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(relu(self.norm2(self.conv1(relu(self.norm1(x))))))


class ResidualNetwork(nn.Module):
    """A 3x3 convolution, `blocks` residual blocks of `width` maps, and a 1x1 convolution that begins at zero.

    Source: Dinh, Sohl-Dickstein, Bengio 2016 (RealNVP), sections 3.6 and 4.1, with group normalisation in place of
    batch normalisation, and without weight normalisation.

    Args:
        inputs, outputs: channels before and after.
        blocks, width: number of residual blocks and of their maps.
        condition: size of the condition vector; 0 for none.

    Raises:
        ValueError: less than no block, or no map; in the forward pass, a condition that is missing or one too many.

    Example:
        >>> import torch
        >>> from revnet.flows import ResidualNetwork
        >>> ResidualNetwork(3, 6, blocks=1, width=8)(torch.randn(2, 3, 4, 4)).shape
        torch.Size([2, 6, 4, 4])
    """

    def __init__(self, inputs: int, outputs: int, blocks: int, width: int, condition: int = 0) -> None:
        super().__init__()
        if blocks < 0 or width < 1:
            raise ValueError(f"blocks={blocks}, width={width}: give at least no block, of at least one map")
        self.first = nn.Conv2d(inputs, width, 3, padding=1)
        self.condition = nn.Linear(condition, width, bias=False) if condition else None
        self.blocks = nn.Sequential(*[_ResidualBlock(width) for _ in range(blocks)])
        self.norm = _norm(width)
        self.last = nn.Conv2d(width, outputs, 1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        condition = _condition(self, self.condition, context)
        x = self.first(x) + (condition[..., None, None] if isinstance(condition, Tensor) else condition)
        return self.last(relu(self.norm(self.blocks(x))))


class ScaleAndShift(nn.Module):
    """(log_scale, shift) for an affine coupling: (scale * tanh(a), b), where a and b are the network's halves.

    Source: Dinh, Sohl-Dickstein, Bengio 2016 (RealNVP), section 4.1. The scale is learnt, one for every channel; it
    begins at 1, because at 0 neither it nor a network that begins at zero would get a gradient.

    Args:
        network: module to twice as many channels as the half that is moved has.
        channels: of that half.

    Example:
        >>> import torch
        >>> from revnet import AffineCoupling
        >>> from revnet.flows import MLP, ScaleAndShift
        >>> layer = AffineCoupling(ScaleAndShift(MLP(3, 6, hidden=16, layers=1), channels=3))
    """

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network = network
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output = self.network(x) if context is None else self.network(x, context)
        log_scale, shift = output.chunk(2, 1)
        return self.scale.view(-1, *[1] * (x.ndim - 2)) * log_scale.tanh(), shift
