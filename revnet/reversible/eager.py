"""Runs as torch.compile meets them. A module of its own because it loads the compiler, which takes a second."""

from __future__ import annotations

import torch

from revnet.reversible.function import apply_run

__all__ = ["apply_run_eagerly"]

apply_run_eagerly = torch.compiler.disable(
    apply_run,
    reason="a reversible sequence that keeps no activations is no part of a compiled graph; compile its branches, or "
    'keep the activations (activations="store")',
)
