"""What the Lightning modules of all tasks have in common: a network, its optimizer and its schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from revnet.training.parameter_groups import parameter_groups

__all__ = ["Task"]


class Task(pl.LightningModule):
    """A network, and the factories of its optimizer and learning-rate schedule; a subclass adds the steps.

    Args:
        network: any module.
        optimizer: `parameter groups -> Optimizer`, such as `partial(torch.optim.SGD, lr=0.1, weight_decay=2e-4)`.
            Its weight decay reaches the weights of convolutions and linear layers and nothing else; see
            `parameter_groups`. None for a network that is only evaluated.
        scheduler: `(optimizer, total_steps=n) -> LRScheduler`, stepped after every optimizer step. None keeps the
            rate as it is.
        config: how network and data are made, as plain dictionaries, lists and numbers. It is written into every
            checkpoint under the key `config` and not looked at otherwise.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None = None,
        scheduler: Callable[..., LRScheduler] | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self._optimizer = optimizer
        self._scheduler = scheduler

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer over `parameter_groups`, and the schedule over the steps that the trainer will take."""
        if self._optimizer is None:
            raise ValueError("optimizer=None: a network needs an optimizer factory to be trained")
        total_steps = self.trainer.estimated_stepping_batches
        if self._scheduler is not None and total_steps == float("inf"):
            raise ValueError("the schedule needs to know when training ends: set the trainer's max_epochs or max_steps")
        optimizer = _make("optimizer", self._optimizer, parameter_groups(self.network))
        if self._scheduler is None:
            return optimizer
        scheduler = _make("scheduler", self._scheduler, optimizer, total_steps=int(total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint self-describing."""
        if self.config is not None:
            checkpoint["config"] = self.config


def _make(what: str, factory: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return factory(*args, **kwargs)
    except (TypeError, ValueError) as error:  # torch's own, for a value that it cannot use
        raise ValueError(f"{what}: {error}") from error
