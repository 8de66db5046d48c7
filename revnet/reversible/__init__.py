"""The reversible engine: couplings, sequences of them, and the backward pass that keeps no activations."""

from revnet.reversible.activations import ACTIVATIONS, Activations
from revnet.reversible.compile import compile_branches
from revnet.reversible.coupling import AdditiveCoupling, AffineCoupling, Coupling, ReversibleBlock, Step
from revnet.reversible.evaluation import is_recomputing
from revnet.reversible.halves import Merge, Rearrangement, Split, split_halves
from revnet.reversible.inverted import invert
from revnet.reversible.sequence import ReversibleSequence
from revnet.reversible.squeeze import Squeeze
from revnet.reversible.switch import Slot, Switched, set_activations, set_chunk_size, slots
from revnet.reversible.watch import ReconstructionError, ReconstructionWarning, Watch

__all__ = [
    "ACTIVATIONS",
    "Activations",
    "AdditiveCoupling",
    "AffineCoupling",
    "Coupling",
    "Merge",
    "Rearrangement",
    "ReconstructionError",
    "ReconstructionWarning",
    "ReversibleBlock",
    "ReversibleSequence",
    "Slot",
    "Split",
    "Squeeze",
    "Step",
    "Switched",
    "Watch",
    "compile_branches",
    "invert",
    "is_recomputing",
    "set_activations",
    "set_chunk_size",
    "slots",
    "split_halves",
]
