"""From 8-bit images to densities on all of space: dequantisation and logit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from revnet.flows.bijection import Bijection
from revnet.flows.finite import has_values
from revnet.reversible import is_recomputing

__all__ = ["Dequantise", "Logit"]


def check_unit_interval(x: Tensor, layer: str, margin: float = 0.0) -> None:
    """Raises ValueError for values further than `margin` outside [0, 1] and for NaN."""
    if not has_values(x) or not x.numel():
        return
    low, high = (value.item() for value in x.detach().aminmax())
    if not (low >= -margin and high <= 1 + margin):
        raise ValueError(
            f"{layer} takes values in [0, 1], got values from {low:.4g} to {high:.4g}; divide 8-bit images by 255, and "
            f"do not normalise them by mean and deviation"
        )


class Dequantise(Bijection):
    """y = (255 x + u) / 256 with noise u; the inverse gives back the level, floor(256 y) / 255.

    u is uniform from 2^-14 to 1 - 2^-8, short of a whole level so that rounding carries no value over: a density that
    is learnt of it may be higher by that, at most 0.006 bits/dim.

    Source: Uria, Murray, Larochelle 2013 (RNADE), section 5.

    The log-determinant is that at fixed u, D log(255/256): the change from x, with levels 1/255 apart, to y, with
    levels 1/256 apart. `Flow.log_prob` gives the density of y, as papers do, and does not count it.

    Flooring has no gradient; that of y passes straight through it.

    Raises:
        ValueError: values outside [0, 1], or in half precision, where they are as far apart as the levels.

    Example:
        >>> import torch
        >>> from revnet.flows import Dequantise
        >>> x = torch.randint(256, (2, 3, 4, 4)) / 255
        >>> bool((Dequantise().inverse(Dequantise()(x)) == x).all())
        True
    """

    def forward_and_log_det(self, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Output and log-determinant of shape (B,)."""
        if x.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"Dequantise: in {x.dtype} there is no room for noise between the 256 levels; give the images in "
                f"float32, and half precision to the couplings alone, by autocast"
            )
        check_unit_interval(x, "Dequantise")
        # Kept off the upper end of a level by more than rounding, also to the grid of exact mode, which could carry a
        # value over: the noise takes up all but 0.4 % of a level, which is at most 0.006 bits/dim.
        noise = 2**-14 + (1 - 2**-8 - 2**-14) * torch.rand_like(x)
        return (255 * x + noise) / 256, _constant(x, math.log(255 / 256))

    def inverse_and_log_det(self, y: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """The levels, and the negative log-determinant."""
        smooth = y * (256 / 255)
        level = (256 * y.detach()).floor().clamp(0, 255) / 255
        # Written so that the value is the level to the last bit.
        return level + (smooth - smooth.detach()), _constant(y, -math.log(255 / 256))


class Logit(Bijection):
    """y = logit(a + (1 - 2a) x); log-determinant sum(log((1 - 2a) / (p (1 - p)))) with p = a + (1 - 2a) x.

    Source: Dinh, Sohl-Dickstein, Bengio 2016 (RealNVP), section 4.1.

    Args:
        a: how far to keep off 0 and 1, in (0, 1/2).

    The inverse maps all of space to (-a / (1 - 2a), (1 - a) / (1 - 2a)), a little more than [0, 1], which is
    what `forward` takes.

    Raises:
        ValueError: values outside of it, or an `a` that cannot be.

    Example:
        >>> import torch
        >>> from revnet.flows import Logit
        >>> layer, x = Logit(), torch.rand(2, 3)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-6)
        True
    """

    def __init__(self, a: float = 0.05) -> None:
        super().__init__()
        if not 0 < a < 0.5:
            raise ValueError(f"a={a!r}: give how far the logit keeps off 0 and 1, above 0 and below 0.5")
        self.a = a

    def forward_and_log_det(self, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Output and log-determinant of shape (B,)."""
        if not is_recomputing():  # reconstructed values may be off by a rounding
            check_unit_interval(x, "Logit", self.a / (1 - 2 * self.a))
        p = self.a + (1 - 2 * self.a) * x
        y = p.log() - (-p).log1p()
        return y, -self._log_det_of_inverse(y)

    def inverse_and_log_det(self, y: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Input and the negative log-determinant."""
        return (y.sigmoid() - self.a) / (1 - 2 * self.a), self._log_det_of_inverse(y)

    def _log_det_of_inverse(self, y: Tensor) -> Tensor:
        """log(p (1 - p)) = logsigmoid(y) + logsigmoid(-y), which no y overflows."""
        terms = logsigmoid(y) + logsigmoid(-y) - math.log(1 - 2 * self.a)
        return terms.flatten(1).sum(1)

    def extra_repr(self) -> str:
        return f"a={self.a}"


def _constant(x: Tensor, per_component: float) -> Tensor:
    return x.new_full((x.shape[0],), math.prod(x.shape[1:]) * per_component)
