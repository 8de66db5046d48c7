"""A plugin for the tests of timm's own models: they see the family of `revnet.timm` in the place of timm's models."""

import timm

import revnet.timm

FAMILY = sorted(set(revnet.timm.__all__) - {"TimmRevNet"})

_list_models = timm.list_models


def list_models(filter="", module="", **arguments):
    """The models of the family that timm would list, whatever their module."""
    return [name for name in _list_models(filter, **arguments) if name in FAMILY]


timm.list_models = list_models


def pytest_collection_modifyitems(config, items):
    """Leaves out the tests of timm's models, and TorchScript, which the reversible engine does not support."""
    ours, others = [], []
    for item in items:
        named = hasattr(item, "callspec") and item.callspec.params.get("model_name") in FAMILY
        (ours if named and "torchscript" not in item.name else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = ours
