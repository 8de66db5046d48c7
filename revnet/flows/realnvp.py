"""RealNVP: affine couplings between pixels and between channels, at several scales."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributions import Distribution

from revnet.flows.bijection import OnHalf
from revnet.flows.flow import Flow
from revnet.flows.networks import ClassEmbedding, ResidualNetwork, ScaleAndShift
from revnet.flows.preprocessing import Logit
from revnet.flows.scaling import ActNorm
from revnet.flows.splits import CheckerboardBranch, CheckerboardSplit, DiagonalFirst, FactorOut
from revnet.reversible import (
    Activations,
    AffineCoupling,
    Merge,
    ReversibleSequence,
    Split,
    Squeeze,
    invert,
    set_activations,
)

__all__ = ["realnvp"]


def realnvp(
    image_shape: Sequence[int],
    scales: int = 2,
    blocks: int = 8,
    width: int = 64,
    couplings: int = 3,
    prior: str | Distribution = "normal",
    classes: int | None = None,
    dequantise: bool = True,
    logit: float | None = 0.05,
    activations: Activations = "reconstruct",
) -> Flow:
    """A RealNVP flow on images. With its defaults the architecture of the paper for CIFAR-10.

    At every scale but the last: `couplings` couplings on a checkerboard, a squeeze, `couplings` between halves of the
    channels, and half of the pixels, those off the diagonal of each square, factored out; at the last `couplings` + 1
    on a checkerboard. Every coupling has a residual network of its own, with twice as many maps behind every squeeze.

    ActNorm stands behind every coupling, on the half that it moved, where the paper has batch normalisation: that could
    not be undone from its output in training mode, and makes the density of an example depend on its batch. Inside the
    coupling networks group normalisation stands in for it, for the same reason; weight normalisation and the sum over
    the outputs of all residual blocks are left out.

    Source: Dinh, Sohl-Dickstein, Bengio 2016 (RealNVP), sections 3 and 4.1.

    Args:
        image_shape: (C, H, W), with H and W multiples of 2 ** (scales - 1) and W of 2 ** scales.
        scales: number of scales, at least 1.
        blocks, width: residual blocks of a coupling's network, and their maps in front of the first squeeze.
        couplings: number of couplings in each part.
        prior: "normal", "logistic" or a distribution of event shape (C * H * W,).
        classes: number of classes; `log_prob`, `sample` and the rest then need the labels as `context`.
        dequantise: for 8-bit images in [0, 1].
        logit: how far the logit keeps off 0 and 1; None leaves it out, for data that are not in [0, 1].
        activations: what becomes of the activations for the backward pass; see `ReversibleSequence`.

    Raises:
        ValueError: an image shape that cannot be halved so often, or another argument out of its range.

    Example:
        >>> import torch
        >>> from revnet.flows import realnvp
        >>> flow = realnvp((3, 8, 8), blocks=1, width=8)
        >>> flow.log_prob(torch.rand(2, 3, 8, 8)).shape, flow.sample(2).shape
        (torch.Size([2]), torch.Size([2, 3, 8, 8]))
    """
    if not isinstance(image_shape, Sequence) or len(image_shape) != 3:
        raise ValueError(f"image_shape={image_shape!r}: give channels, height and width, such as (3, 32, 32)")
    channels, height, columns = image_shape
    if scales < 1 or couplings < 1 or height % 2 ** (scales - 1) or columns % 2**scales:
        raise ValueError(
            f"image_shape={tuple(image_shape)}, scales={scales}, couplings={couplings}: give at least one scale and "
            f"one coupling, and images whose height can be halved scales - 1 times and whose width scales times"
        )
    embedding = None if classes is None else ClassEmbedding(classes)
    condition = 0 if embedding is None else embedding.embedding_dim

    def branch(inputs: int) -> ScaleAndShift:
        return ScaleAndShift(ResidualNetwork(inputs, 2 * inputs, blocks, width, condition), inputs)

    def checkerboard(number: int) -> list[nn.Module]:
        moves = []
        for swap in (bool(index % 2) for index in range(number)):
            coupling = AffineCoupling(CheckerboardBranch(branch(channels), swap), swap)
            moves += [coupling, OnHalf(ActNorm(channels), int(swap))]
        return [CheckerboardSplit(), *moves, invert(CheckerboardSplit())]

    def channelwise(number: int) -> list[nn.Module]:
        moves = []
        for swap in (bool(index % 2) for index in range(number)):
            moves += [AffineCoupling(branch(channels // 2), swap), OnHalf(ActNorm(channels // 2), int(swap))]
        return [Split(), *moves, Merge()]

    parts: list[list[nn.Module]] = []
    latents = []
    for _ in range(scales - 1):
        part = [*checkerboard(couplings), Squeeze()]
        channels, height, columns, width = 4 * channels, height // 2, columns // 2, 2 * width
        parts.append([*part, *channelwise(couplings), DiagonalFirst(), FactorOut()])
        channels //= 2
        latents.append((channels, height, columns))
    parts.append(checkerboard(couplings + 1))
    latents.append((channels, height, columns))
    if logit is not None:
        parts[0].insert(0, Logit(logit))
    flow = Flow(
        stages=[ReversibleSequence(part) for part in parts],
        event_shape=image_shape,
        latent_shapes=latents,
        prior=prior,
        dequantise=dequantise,
        embedding=embedding,
    )
    set_activations(flow, activations)
    return flow
