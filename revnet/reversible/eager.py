"""Runs as torch.compile meets them. A module of its own because it loads the compiler, which takes a second."""

from __future__ import annotations

import torch

from revnet.reversible.function import reconstructed
from revnet.reversible.recompute import recomputed

__all__ = ["recomputed_eagerly", "reconstructed_eagerly"]

_REASON = (
    "a reversible sequence that keeps no activations is no part of a compiled graph; compile its branches, or "
    'keep the activations (activations="store")'
)
reconstructed_eagerly = torch.compiler.disable(reconstructed, reason=_REASON)
recomputed_eagerly = torch.compiler.disable(recomputed, reason=_REASON)
