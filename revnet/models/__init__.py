"""Residual networks, reversible and not, and their registry."""

from revnet.models.network import PreActResNet, RevNet
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

__all__ = [
    "PreActResNet",
    "RevNet",
    "get_model",
    "list_models",
    "preact_resnet50",
    "preact_resnet101",
    "register_model",
    "resnet32",
    "resnet110",
    "resnet164",
    "revnet38",
    "revnet56",
    "revnet104",
    "revnet110",
    "revnet164",
]
