"""Random networks for the property-based tests."""

from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import strategies as st

from tests.reversible.networks import BRANCHES, VALUES, dropout, droppath, sequence, step, tokens

__all__ = ["Case", "cases"]

# What follows the batch (and the channels, unless they are last), and the dimension of the channels.
LAYOUTS = {
    "features": ((), 1),
    "series": ((7,), 1),
    "images": ((5, 4), 1),
    "volumes": ((3, 2, 4), 1),
    "tokens": ((6,), -1),
}
FORMATS = {"images": torch.channels_last, "volumes": torch.channels_last_3d}
OF_TOKENS = {"tokens": tokens, "dropout": partial(dropout, inner=tokens), "droppath": partial(droppath, inner=tokens)}
# The dtype of the stream, and that of autocast.
PRECISIONS = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bf16": (torch.float32, torch.bfloat16),
}


@dataclass(frozen=True)
class Case:
    """A network and a batch for it."""

    layout: str
    branch: str
    channels: int
    plan: tuple[str, ...]
    precision: str
    channels_last: bool
    exact: bool

    def step(self, activations):
        """Output and gradients of one seeded step; None: activations as in the plan."""
        dtype, autocast = PRECISIONS[self.precision]
        extent, dim = LAYOUTS[self.layout]
        memory_format = FORMATS[self.layout] if self.channels_last else torch.contiguous_format
        branches, rank = (OF_TOKENS, 0) if dim == -1 else (BRANCHES, len(extent))
        net = sequence(
            activations or self.plan,
            len(self.plan) - 2,
            self.channels,
            partial(branches[self.branch], rank=rank),
            dtype,
            dim,
            self.exact,
        ).to(memory_format=memory_format)
        width = 2 * self.channels
        shape = (6, *extent, width) if dim == -1 else (6, width, *extent)
        x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(3))
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            return step(net, x.contiguous(memory_format=memory_format), loss=lambda y: y.square().mean())


# All three values in any order, with more of them in between; or the same value throughout.
PLANS = st.one_of(
    st.lists(st.sampled_from(VALUES), max_size=5).flatmap(lambda more: st.permutations([*VALUES, *more])),
    st.tuples(st.sampled_from(VALUES[1:]), st.integers(3, 9)).map(lambda pair: [pair[0]] * pair[1]),
)


@st.composite
def cases(draw, precisions, exact):
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    branches = OF_TOKENS if layout == "tokens" else BRANCHES
    return Case(
        layout,
        draw(st.sampled_from(sorted(branches))),
        draw(st.integers(1, 6)),
        tuple(draw(PLANS)),
        draw(st.sampled_from(precisions)),
        layout in FORMATS and draw(st.booleans()),
        exact,
    )
