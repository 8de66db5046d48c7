"""The family among torchvision's models: after `register()` its `get_model` knows `revnet50` and its kin.

Nothing else in the package imports this module.
"""

from collections.abc import Callable
from functools import wraps
from os import PathLike
from typing import Any

from torch import nn
from torchvision.models import WeightsEnum
from torchvision.models._api import BUILTIN_MODELS, register_model

from revnet.models import family

__all__ = ["RevNetWeights", "register"]


class RevNetWeights(WeightsEnum):
    """The published weights of the family: none yet, so it has no members."""


def register() -> None:
    """Makes the networks of `revnet.models.family` known to torchvision, as often as it is called.

    `torchvision.models.get_model`, `get_model_builder` and `list_models` then find them, and `get_model_weights` gives
    `RevNetWeights`. A name that torchvision has already stays what it is.

    Example:
        >>> import torchvision
        >>> import revnet.torchvision
        >>> revnet.torchvision.register()
        >>> network = torchvision.models.get_model("revnet50", num_classes=10)
        >>> list(torchvision.models.get_model_weights("revnet50"))
        []
    """
    for name in family.BUILDERS:
        if name not in BUILTIN_MODELS:
            register_model(name)(_with_weights(getattr(family, name)))


def _with_weights(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The builder with the signature from which torchvision takes the weights that there are for it."""

    @wraps(build, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def builder(
        *, weights: RevNetWeights | str | PathLike[str] | None = None, progress: bool = True, **arguments: Any
    ) -> nn.Module:
        return build(weights=weights, progress=progress, **arguments)

    del builder.__wrapped__
    return builder
