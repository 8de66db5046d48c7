"""Normalising flows on the reversible engine: densities whose training keeps no activations.

Couplings, `Split`, `Merge` and `Squeeze` are the engine's; here are the other layers, coupling networks, priors, and
the models NICE and RealNVP.
"""

from revnet.flows.bijection import Bijection, OnHalf
from revnet.flows.convolution import InvertibleConvolution
from revnet.flows.finite import NonFiniteError
from revnet.flows.flow import Flow, bits_per_dim
from revnet.flows.networks import MLP, ClassEmbedding, ResidualNetwork, ScaleAndShift
from revnet.flows.nice import nice
from revnet.flows.preprocessing import Dequantise, Logit
from revnet.flows.priors import Logistic
from revnet.flows.realnvp import realnvp
from revnet.flows.scaling import ActNorm, Scaling
from revnet.flows.splits import CheckerboardBranch, CheckerboardSplit, DiagonalFirst, FactorOut, Flatten, OddEvenSplit
from revnet.reversible import AdditiveCoupling, AffineCoupling, Merge, Split, Squeeze

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "Bijection",
    "CheckerboardBranch",
    "CheckerboardSplit",
    "ClassEmbedding",
    "Dequantise",
    "DiagonalFirst",
    "FactorOut",
    "Flatten",
    "Flow",
    "InvertibleConvolution",
    "Logistic",
    "Logit",
    "MLP",
    "Merge",
    "NonFiniteError",
    "OddEvenSplit",
    "OnHalf",
    "ResidualNetwork",
    "ScaleAndShift",
    "Scaling",
    "Split",
    "Squeeze",
    "bits_per_dim",
    "nice",
    "realnvp",
]
