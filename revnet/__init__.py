"""Reversible residual networks for PyTorch: drop-in ResNets whose backward pass reconstructs its activations."""

from revnet.reversible import (
    AdditiveCoupling,
    AffineCoupling,
    ReversibleBlock,
    ReversibleSequence,
    compile_branches,
    is_recomputing,
    set_activations,
)

__version__ = "0.1.0"

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "ReversibleBlock",
    "ReversibleSequence",
    "compile_branches",
    "is_recomputing",
    "set_activations",
]
