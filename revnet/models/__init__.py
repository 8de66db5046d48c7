"""Residual networks, reversible and not, and their registry."""

from revnet.models.family import (
    revnet18,
    revnet34,
    revnet50,
    revnet101,
    revnet152,
    revnext50_32x4d,
    wide_revnet50_2,
)
from revnet.models.network import FullyReversibleNet, PreActResNet, RevNet
from revnet.models.paper import (
    preact_resnet50,
    preact_resnet101,
    resnet32,
    resnet110,
    resnet164,
    revnet38,
    revnet56,
    revnet104,
    revnet110,
    revnet164,
)
from revnet.models.registry import get_model, list_models, register_model
from revnet.models.weights import architecture_of, load_weights, save_weights

__all__ = [
    "FullyReversibleNet",
    "PreActResNet",
    "RevNet",
    "architecture_of",
    "get_model",
    "list_models",
    "load_weights",
    "preact_resnet50",
    "preact_resnet101",
    "register_model",
    "resnet32",
    "resnet110",
    "resnet164",
    "revnet18",
    "revnet34",
    "revnet38",
    "revnet50",
    "revnet56",
    "revnet101",
    "revnet104",
    "revnet110",
    "revnet152",
    "revnet164",
    "revnext50_32x4d",
    "save_weights",
    "wide_revnet50_2",
]
