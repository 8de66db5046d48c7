"""Switching what becomes of the activations in a live network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from revnet.reversible.activations import Activations, checked, checked_value
from revnet.reversible.sequence import ReversibleSequence

__all__ = ["Slot", "Switched", "sequences_of", "set_activations", "set_chunk_size", "slots"]


class Switched(nn.Module):
    """A network with a stem and a tail, children outside its sequences that go through the engine too.

    Attributes:
        stem, tail: names of the children, in the order in which they run.
        stem_activations, tail_activations: "store", or anything else to keep no more than their input.
    """

    stem: tuple[str, ...] = ()
    tail: tuple[str, ...] = ()
    stem_activations: str = "store"
    tail_activations: str = "store"

    def run_stem(self, x: Tensor) -> Tensor:
        """The output of the stem."""
        return self._run(x, self.stem, self.stem_activations)

    def run_tail(self, x: Tensor) -> Tensor:
        """The output of the tail."""
        return self._run(x, self.tail, self.tail_activations)

    def _run(self, x: Tensor, names: tuple[str, ...], activations: str) -> Tensor:
        modules = [getattr(self, name) for name in names]
        if isinstance(x, torch.fx.Proxy):  # a symbolic trace shows them one by one
            for module in modules:
                x = module(x)
            return x
        return ReversibleSequence([nn.Sequential(*modules)], activations)(x)


@dataclass(frozen=True)
class Slot:
    """A place in a network that has a value of `activations` of its own: a layer of a sequence, a stem or a tail.

    Attributes:
        name: in the network, such as "layer1.0" or "stem".
        owner: the sequence, or the network that has the stem or tail.
        index: of the layer in its sequence; None for a stem or tail.
    """

    name: str
    owner: ReversibleSequence | Switched
    index: int | None = None

    def modules(self) -> list[nn.Module]:
        """The layer, or the children that make up the stem or tail."""
        if isinstance(self.owner, ReversibleSequence):
            return [self.owner[self.index]]
        return [getattr(self.owner, name) for name in getattr(self.owner, self._end)]

    def value(self) -> str:
        """What is done there: a single value of the sequence is resolved for the layer."""
        if isinstance(self.owner, ReversibleSequence):
            assert self.index is not None
            return self.owner.plan()[self.index]
        return "store" if getattr(self.owner, f"{self._end}_activations") == "store" else "recompute"

    def set_end(self, value: str) -> None:
        """Sets the value of a stem or tail."""
        setattr(self.owner, f"{self._end}_activations", value)

    @property
    def _end(self) -> str:
        return self.name.rpartition(".")[2]


def slots(module: nn.Module) -> list[Slot]:
    """The places of a network that a plan has values for: each sequence's layers, between a stem and a tail.

    In the order in which the network registers its parts, which is that of its forward pass in any network that is
    written so.

    Example:
        >>> from revnet.models import revnet38
        >>> from revnet.reversible import slots
        >>> [slot.name for slot in slots(revnet38())][:3]
        ['stem', 'layer1.0', 'layer1.1']
    """
    return list(_slots(module, "", set()))


def _slots(module: nn.Module, prefix: str, seen: set[nn.Module]) -> Iterator[Slot]:
    if module in seen:
        return
    seen.add(module)
    if isinstance(module, ReversibleSequence):
        for index in range(len(module)):
            yield Slot(f"{prefix}{index}", module, index)
    if isinstance(module, Switched) and module.stem:
        yield Slot(f"{prefix}stem", module)
    for name, child in module.named_children():
        yield from _slots(child, f"{prefix}{name}.", seen)
    if isinstance(module, Switched) and module.tail:
        yield Slot(f"{prefix}tail", module)


def set_activations(module: nn.Module, activations: Activations) -> None:
    """Sets what becomes of the activations in every sequence of a live network, and in its stem and tail.

    Args:
        module: a network or a sequence.
        activations: "store", "recompute" or "reconstruct" for everything; or a plan, one value for each of
            `slots(module)`. Stem and tail have no inverse: a plan gives them "store" or "recompute".

    Raises:
        ValueError: the module has no sequence, an unknown value, a plan of the wrong length or that asks a layer
            without an inverse to reconstruct.

    Example:
        >>> from revnet import set_activations
        >>> from revnet.models import revnet38
        >>> network = revnet38(num_classes=10)
        >>> set_activations(network, "recompute")
    """
    found = slots(module)
    sequences = sequences_of(module, "set_activations")
    ends = [slot for slot in found if not isinstance(slot.owner, ReversibleSequence)]
    if isinstance(activations, str) or not isinstance(activations, Iterable):
        checked_value(activations)
        for sequence in sequences:
            sequence.activations = activations
        for slot in ends:
            slot.set_end(activations)
        return
    values = tuple(activations)
    if len(values) != len(found):
        raise ValueError(
            f"activations: a plan needs one value for each layer{', stem and tail included' if ends else ''}; got "
            f"{len(values)} values for {len(found)} layers"
        )
    shares: dict[ReversibleSequence, list[str]] = {sequence: [] for sequence in sequences}
    for slot, value in zip(found, values, strict=True):
        if isinstance(slot.owner, ReversibleSequence):
            shares[slot.owner].append(value)
        elif checked_value(value) == "reconstruct":
            raise ValueError(
                f'activations: the plan asks {slot.name} to reconstruct, but it has no inverse; give it "recompute" or '
                f'"store"'
            )
    plans = [(sequence, checked(list(sequence), share)) for sequence, share in shares.items()]
    for sequence, plan in plans:
        sequence.activations = plan
    for slot, value in zip(found, values, strict=True):
        if slot in ends:
            slot.set_end(value)


def set_chunk_size(module: nn.Module, chunk_size: int | None) -> None:
    """Sets after how many reconstructed layers the backward pass of every sequence hands over the gradients it has.

    For training in several processes, which average gradients while the backward pass goes on: see `chunk_size` of
    `ReversibleSequence`. In one process it only costs memory: each chunk keeps its output.

    Args:
        module: a network or a sequence.
        chunk_size: a number of layers, or None for all of a sequence.

    Raises:
        ValueError: the module has no sequence, or `chunk_size` is no number of layers.

    Example:
        >>> from revnet.models import revnet38
        >>> from revnet.reversible import set_chunk_size
        >>> network = revnet38(num_classes=10)
        >>> set_chunk_size(network, 4)
    """
    for sequence in sequences_of(module, "set_chunk_size"):
        sequence.chunk_size = chunk_size


def sequences_of(
    module: nn.Module, caller: str, remedy: str = "give it a RevNet or a sequence"
) -> list[ReversibleSequence]:
    """The sequences of a network; ValueError, in the name of the function that asks, if it has none."""
    found = [m for m in module.modules() if isinstance(m, ReversibleSequence)]
    if not found:
        raise ValueError(f"{caller}: {type(module).__name__} holds no ReversibleSequence; {remedy}")
    return found
