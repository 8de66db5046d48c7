"""Switching what becomes of the activations in a live network."""

from __future__ import annotations

from itertools import accumulate, pairwise

from torch import nn

from revnet.reversible.sequence import Activations, ReversibleSequence, checked_value

__all__ = ["Switched", "set_activations"]


class Switched(nn.Module):
    """A module that `set_activations` reaches besides the sequences: it passes parts of itself through the engine.

    Attributes:
        activations: a single value, as of a sequence.
    """

    activations: Activations = "store"


def set_activations(module: nn.Module, activations: Activations) -> None:
    """Sets what becomes of the activations in every sequence of a live network.

    Args:
        module: a network or a sequence.
        activations: "store", "recompute" or "reconstruct" for all its parts (a stem or tail outside the sequences
            included); or a plan, one value for each layer of its sequences in the order of `module.modules()`.

    Raises:
        ValueError: the module has no sequence, an unknown value, a plan of the wrong length or that asks a layer
            without an inverse to reconstruct.

    Example:
        >>> from revnet import set_activations
        >>> from revnet.models import revnet38
        >>> network = revnet38(num_classes=10)
        >>> set_activations(network, "recompute")
    """
    sequences = [m for m in module.modules() if isinstance(m, ReversibleSequence)]
    if not sequences:
        raise ValueError(f"set_activations: {type(module).__name__} holds no ReversibleSequence; nothing could be set")
    if isinstance(activations, str):
        checked_value(activations)
        for part in module.modules():
            if isinstance(part, ReversibleSequence | Switched):
                part.activations = activations
        return
    plan, total = tuple(activations), sum(map(len, sequences))
    if len(plan) != total:
        raise ValueError(
            f"activations: a plan needs one value for each layer; got {len(plan)} values for {total} layers"
        )
    starts = [0, *accumulate(map(len, sequences))]
    shares = [s.checked(plan[a:b]) for s, (a, b) in zip(sequences, pairwise(starts), strict=True)]
    for sequence, share in zip(sequences, shares, strict=True):
        sequence.activations = share
