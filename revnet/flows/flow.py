"""A normalising flow: a density over examples that can be evaluated and sampled from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from revnet.flows.finite import check_finite
from revnet.flows.preprocessing import Dequantise
from revnet.flows.priors import PRIORS
from revnet.flows.splits import FactorOut
from revnet.reversible import ReversibleSequence

__all__ = ["Flow", "bits_per_dim"]


def bits_per_dim(log_prob: Tensor, dims: int) -> Tensor:
    """(D log 256 - log_prob) / (D log 2): bits per component of 8-bit data, given the density of y in [0, 1].

    Args:
        log_prob: in nats, of any shape.
        dims: D, the number of components.

    Example:
        >>> import torch
        >>> from revnet.flows import bits_per_dim
        >>> bits_per_dim(torch.zeros(1), 3072)  # the uniform density
        tensor([8.])
    """
    return (dims * math.log(256) - log_prob) / (dims * math.log(2))


class Flow(nn.Module):
    """log p(x) = log p(z) + log |det dz/dx| with z = f(x), where f is one sequence after another.

    A stage that ends in `FactorOut` gives the second half of its channels away: they become part of z as they are, and
    the first half goes on to the next stage.

    Args:
        stages: sequences of invertible layers, from tensor to tensor but for a `FactorOut` at the end.
        event_shape: of an example.
        latent_shapes: of what the stages factor out, in order, and of what the last one returns; None where the last
            stage returns one tensor of the event's shape and nothing is factored out.
        prior: of the latent vector, of D components: "normal", "logistic", or a distribution of event shape (D,).
        dequantise: add noise to 8-bit data, see `Dequantise`; densities are then those of the data with noise,
            y = (255 x + u) / 256, whose negative logarithm bounds that of the 8-bit data's probability (to 0.006
            bits/dim, by which the noise is narrower than a level).
        embedding: module from the caller's `context` to the extra input of the branches; None: it is passed on.

    Attributes:
        dims: D, the number of components of an example.

    Memory for gradients is that of the stages' sequences, in both directions: under `activations="reconstruct"` it does
    not grow with their depth. `revnet.set_activations(flow, value)` switches them.

    Raises:
        TypeError: the prior is neither a name nor a distribution.
        ValueError: a prior of another name or shape, shapes that do not add up, a `FactorOut` inside a stage.

    Example:
        >>> import torch
        >>> from revnet import AffineCoupling, ReversibleSequence
        >>> from revnet.flows import MLP, Flow, ScaleAndShift
        >>> from revnet.reversible import Merge, Split
        >>> branches = [ScaleAndShift(MLP(1, 2, hidden=32, layers=2), channels=1) for _ in range(4)]
        >>> couplings = [AffineCoupling(branch, swap=bool(i % 2)) for i, branch in enumerate(branches)]
        >>> flow = Flow([ReversibleSequence([Split(), *couplings, Merge()])], event_shape=(2,))
        >>> flow.log_prob(flow.sample(5)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        stages: Iterable[ReversibleSequence],
        event_shape: Sequence[int],
        latent_shapes: Sequence[Sequence[int]] | None = None,
        prior: str | Distribution = "normal",
        dequantise: bool = False,
        embedding: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        if any(isinstance(layer, FactorOut) for stage in self._stages() for layer in stage[:-1]):
            raise ValueError(
                "stages: FactorOut stands inside a stage; let it end the stage, and begin another behind it"
            )
        self.event_shape = tuple(event_shape)
        self.dims = math.prod(self.event_shape)
        self.latent_shapes = tuple(map(tuple, [self.event_shape] if latent_shapes is None else latent_shapes))
        if sum(map(math.prod, self.latent_shapes)) != self.dims:
            raise ValueError(
                f"latent_shapes={self.latent_shapes} hold {sum(map(math.prod, self.latent_shapes))} components, but "
                f"event_shape={self.event_shape} has {self.dims}; a flow keeps their number"
            )
        self._prior = prior
        self._check_prior()
        self.dequantise = Dequantise() if dequantise else None
        self.embedding = embedding

    def _check_prior(self) -> None:
        if isinstance(self._prior, str):
            if self._prior not in PRIORS:
                raise ValueError(f"prior={self._prior!r}: give one of {', '.join(map(repr, PRIORS))} or a distribution")
        elif not isinstance(self._prior, Distribution):
            raise TypeError(f"prior={self._prior!r}: give one of {', '.join(map(repr, PRIORS))} or a distribution")
        elif tuple(self._prior.event_shape) != (self.dims,) or self._prior.batch_shape:
            raise ValueError(
                f"prior has event shape {tuple(self._prior.event_shape)} and batch shape "
                f"{tuple(self._prior.batch_shape)}; the latent vector takes ({self.dims},) and (): "
                f"torch.distributions.Independent(prior, 1) makes a batch of components one event"
            )

    @property
    def prior(self) -> Distribution:
        """The distribution of the latent vector: a named one on the device and in the dtype of the flow."""
        return self._prior_at(self._like())

    def _prior_at(self, x: Tensor) -> Distribution:
        """A named prior on the device and in the dtype of `x`; one of the caller's own as it is."""
        return PRIORS[self._prior](x.new_zeros(self.dims)) if isinstance(self._prior, str) else self._prior

    def _like(self) -> Tensor:
        """A tensor on the device and in the dtype of the flow."""
        return next((t for t in chain(self.parameters(), self.buffers()) if t.is_floating_point()), torch.empty(0))

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """`log_prob`, for what calls modules: DistributedDataParallel, torch.compile, `revnet.profiling`."""
        return self.log_prob(x, context)

    def log_prob(self, x: Tensor, context: Any = None) -> Tensor:
        """Log-density in nats, of shape (B,); with `dequantise` that of a noisy copy, a new one at every call.

        Args:
            x: examples of shape (B, *event_shape), in [0, 1] for a flow on images.
            context: condition of each example, of the labels' shape (B,) for a flow with classes.

        Raises:
            ValueError: x has the wrong shape or, for images, values outside [0, 1] (without `dequantise`: outside the
                domain of their logit, which is a little wider).
            NonFiniteError: a latent or the log-determinant is NaN or infinite.
        """
        z, log_det = self.encode_and_log_det(x, context)
        return self._prior_at(z).log_prob(z) + log_det

    def encode(self, x: Tensor, context: Any = None) -> Tensor:
        """The latent vectors z = f(x), of shape (B, D). Arguments and errors are those of `log_prob`."""
        return self.encode_and_log_det(x, context)[0]

    def encode_and_log_det(self, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """The latent vectors and log |det dz/dx|, of shape (B,); with `dequantise` dz/dy, see `Dequantise`."""
        if tuple(x.shape[1:]) != self.event_shape or not x.is_floating_point():
            raise ValueError(
                f"x has shape {tuple(x.shape)} and dtype {x.dtype}; give floating-point examples of shape "
                f"(B, {', '.join(map(str, self.event_shape))})"
            )
        context = self._embedded(context, len(x))
        y: Any = x if self.dequantise is None else self.dequantise(x)
        h, log_det, factored = y, x.new_zeros(len(x)), []
        for index, stage in enumerate(self._stages()):
            h, term = stage.forward_and_log_det(h, context=context)
            log_det = log_det + term
            if isinstance(h, tuple):
                if not isinstance(stage[-1], FactorOut):
                    raise ValueError(f"stages: stage {index} returns two halves; let Merge or FactorOut end it")
                h, out = h
                factored.append(out)
        latents = [*factored, h]
        shapes = tuple(tuple(latent.shape[1:]) for latent in latents)
        if shapes != self.latent_shapes:
            raise ValueError(f"latent_shapes={self.latent_shapes}, but the stages gave {shapes}; name these")
        z = torch.cat([latent.flatten(1) for latent in latents], 1)
        check_finite(self._stages(), (y,), context, (z, log_det))
        return z, log_det

    def decode(self, z: Tensor, context: Any = None) -> Tensor:
        """The examples x with f(x) = z; with `dequantise` the 8-bit levels nearest below.

        Gradients reach parameters, z and context; those of the levels are those of the values before flooring.

        Args:
            z: latent vectors of shape (B, D).
            context: as in `log_prob`.

        Raises:
            ValueError: z has the wrong shape.
            NonFiniteError: the inverse of a layer is NaN or infinite.
        """
        return self.decode_and_log_det(z, context)[0]

    def decode_and_log_det(self, z: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """The examples and log |det dx/dz|, of shape (B,): the negative of what `encode_and_log_det` gives there."""
        if z.ndim != 2 or z.shape[1] != self.dims:
            raise ValueError(f"z has shape {tuple(z.shape)}; give latent vectors of shape (B, {self.dims})")
        context = self._embedded(context, len(z))
        parts = z.split([math.prod(shape) for shape in self.latent_shapes], 1)
        latents = [part.unflatten(1, shape) for part, shape in zip(parts, self.latent_shapes, strict=True)]
        ends, y, log_det = tuple(latents), latents.pop(), z.new_zeros(len(z))
        for stage in reversed(self._stages()):
            given = latents.pop() if isinstance(stage[-1], FactorOut) else None
            y, term = stage.inv.forward_and_log_det(y, given, context)
            log_det = log_det + term
        check_finite(self._stages(), ends, context, (y, log_det), inverse=True)
        return (y if self.dequantise is None else self.dequantise.inverse(y)), log_det

    def sample(self, n: int, temperature: float = 1.0, context: Any = None) -> Tensor:
        """`n` examples, without a graph.

        Args:
            n: how many, at least 1.
            temperature: factor of the latents' distance from the prior's mean; below 1 examples are more typical.
            context: condition of each example, or one label for all of them.

        Raises:
            ValueError: n < 1, or a temperature that is negative.
        """
        with torch.no_grad():
            return self.decode(self._latents(n, temperature), self._for_each(context, n))

    def sample_and_log_prob(self, n: int, temperature: float = 1.0, context: Any = None) -> tuple[Tensor, Tensor]:
        """`n` examples with their log-density, with a graph: for training on the flow's own samples.

        The log-density is that of the flow, whatever the temperature that z was drawn at; with `dequantise` that of
        the values before flooring. Arguments and errors are those of `sample`.

        For a loss of samples and data in one graph, call `log_prob` on a batch first: it gives `ActNorm` and `Scaling`
        their parameters, which would else change behind the samples, and the backward pass would say so.
        """
        z = self._latents(n, temperature)
        x, log_det = self.decode_and_log_det(z, self._for_each(context, n))
        return x, self._prior_at(z).log_prob(z) - log_det

    def interpolate(self, x1: Tensor, x2: Tensor, steps: int, context: Any = None) -> Tensor:
        """Examples on the way from x1 to x2, of shape (steps, *x1.shape): the great circle between their latents.

        Args:
            x1, x2: examples of shape (B, *event_shape).
            steps: how many, both ends included, at least 2.
            context: as in `log_prob`.

        Raises:
            ValueError: fewer than two steps, or shapes that differ.
        """
        if steps < 2 or x1.shape != x2.shape:
            raise ValueError(
                f"steps={steps} between {tuple(x1.shape)} and {tuple(x2.shape)}: give at least 2 steps, both ends "
                f"included, and as many examples at one end as at the other"
            )
        with torch.no_grad():
            z1, z2 = self.encode(x1, context), self.encode(x2, context)
            return torch.stack([self.decode(_between(z1, z2, k / (steps - 1)), context) for k in range(steps)])

    def bits_per_dim(self, log_prob: Tensor) -> Tensor:
        """What `log_prob` is in bits per component of 8-bit data; see `revnet.flows.bits_per_dim`."""
        return bits_per_dim(log_prob, self.dims)

    def _stages(self) -> list[ReversibleSequence]:
        return list(self.stages)  # type: ignore[arg-type]

    def _latents(self, n: int, temperature: float) -> Tensor:
        if n < 1:
            raise ValueError(f"n={n}: give how many examples to sample, at least 1")
        if not temperature >= 0:
            raise ValueError(f"temperature={temperature}: give a factor of the latents' spread, at least 0")
        prior = self.prior
        z = prior.sample((n,))
        return z if temperature == 1 else prior.mean + temperature * (z - prior.mean)

    def _for_each(self, context: Any, n: int) -> Any:
        """One label for all becomes one for each."""
        if isinstance(context, int) or (isinstance(context, Tensor) and context.ndim == 0):
            return torch.as_tensor(context, device=self._like().device).expand(n)
        return context

    def _embedded(self, context: Any, n: int) -> Any:
        if isinstance(context, Tensor) and context.shape[:1] != (n,):
            raise ValueError(f"context has shape {tuple(context.shape)} for {n} examples; give one entry for each")
        if self.embedding is None:
            return context
        if context is None:
            raise ValueError("context: this flow has a condition; give one for each example, such as its label")
        return self.embedding(context)


def _between(z1: Tensor, z2: Tensor, t: float) -> Tensor:
    """Spherical interpolation, row by row. Straight where the angle is next to nothing."""
    cosine = torch.nn.functional.cosine_similarity(z1, z2, 1).clamp(-1, 1)[:, None]
    angle, straight = cosine.acos(), cosine.abs() > 1 - 1e-6
    safe = torch.where(straight, 1.0, angle)
    first = torch.where(straight, 1 - t, ((1 - t) * safe).sin() / safe.sin())
    second = torch.where(straight, t, (t * safe).sin() / safe.sin())
    return first * z1 + second * z2
