"""NICE: additive couplings between every other component, and a diagonal scaling on top."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.distributions import Distribution

from revnet.flows.flow import Flow
from revnet.flows.networks import MLP, ClassEmbedding
from revnet.flows.scaling import Scaling
from revnet.flows.splits import Flatten, OddEvenSplit
from revnet.reversible import Activations, AdditiveCoupling, ReversibleSequence, invert, set_activations

__all__ = ["nice"]


def nice(
    event_shape: Sequence[int],
    couplings: int = 4,
    hidden: int = 1000,
    layers: int = 5,
    prior: str | Distribution = "logistic",
    classes: int | None = None,
    dequantise: bool = True,
    activations: Activations = "reconstruct",
    exact: bool | None = None,
) -> Flow:
    """A NICE flow. Its defaults are the network of the paper for MNIST, which reports 1980.50 nats on the test set.

    Odd and even components take turns in moving each other; only the scaling has a log-determinant that is not 0.

    Source: Dinh, Krueger, Bengio 2014 (NICE), section 5.1.

    Args:
        event_shape: of an example, with an even number of components.
        couplings: number of additive couplings; with less than 3 some components depend on few others.
        hidden, layers: width and number of the hidden layers of ReLU units in each coupling.
        prior: "logistic", "normal" or a distribution of event shape (D,).
        classes: number of classes; `log_prob`, `sample` and the rest then need the labels as `context`.
        dequantise: for 8-bit data in [0, 1]; False for other data.
        activations: what becomes of the activations for the backward pass; see `ReversibleSequence`.
        exact: keep the couplings on the fixed-point grid; see `ReversibleSequence`. The scaling is never on it.

    Raises:
        ValueError: an odd number of components, or another argument out of its range.

    Example:
        >>> import torch
        >>> from revnet.flows import nice
        >>> flow = nice((1, 4, 4), hidden=32, layers=2)
        >>> flow.log_prob(torch.rand(3, 1, 4, 4)).shape, flow.sample(2).shape
        (torch.Size([3]), torch.Size([2, 1, 4, 4]))
    """
    if not isinstance(event_shape, Sequence):
        raise ValueError(f"event_shape={event_shape!r}: give the shape of an example, such as (1, 28, 28) or (784,)")
    dims = math.prod(event_shape)
    if dims % 2 or couplings < 1:
        raise ValueError(
            f"event_shape={tuple(event_shape)} has {dims} components, couplings={couplings}: give an even number of "
            f"components, which are split in two halves, and at least one coupling"
        )
    embedding = None if classes is None else ClassEmbedding(classes)
    condition = 0 if embedding is None else embedding.embedding_dim
    branches = [MLP(dims // 2, dims // 2, hidden, layers, condition) for _ in range(couplings)]
    moves = [AdditiveCoupling(branch, swap=bool(index % 2)) for index, branch in enumerate(branches)]
    flow = Flow(
        stages=[
            ReversibleSequence(
                [Flatten(tuple(event_shape)), OddEvenSplit(), *moves, invert(OddEvenSplit())], exact=exact
            ),
            ReversibleSequence([Scaling((dims,))]),
        ],
        event_shape=event_shape,
        latent_shapes=[(dims,)],
        prior=prior,
        dequantise=dequantise,
        embedding=embedding,
    )
    set_activations(flow, activations)
    return flow
