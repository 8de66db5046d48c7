"""What the Lightning modules of all tasks have in common: a network, its optimizer and its schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from revnet.training.parameter_groups import parameter_groups

__all__ = ["Task"]


class Task(pl.LightningModule):
    """A network, and the factories of its optimizer and learning-rate schedule; a subclass adds the steps.

    A training that goes on from a checkpoint takes the optimizer's state from there, and those of its settings that
    have been changed since (`lr`, `weight_decay`, ...) from here. Where an epoch has another number of steps than
    before (another batch size, accumulation or number of devices), the schedule goes on at the same share of the way.

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
        self._settings: dict[str, Any] = {}
        self._loaded_settings: dict[str, Any] = {}
        self._steps_per_epoch: float | None = None  # of a training whose length is a number of epochs

    def try_settings(self) -> None:
        """Make optimizer and schedule once for nothing, so that what they refuse is known before data is loaded.

        Not for an optimizer that asks for the other processes of a training.

        Raises:
            ValueError: one of them refuses its settings.
        """
        optimizer = self._made_optimizer()
        if self._scheduler is not None:
            _make("scheduler", self._scheduler, optimizer, total_steps=10**6)  # longer than any part of it

    def _made_optimizer(self) -> Optimizer:
        if self._optimizer is None:
            raise ValueError("optimizer=None: a network needs an optimizer factory to be trained")
        return _make("optimizer", self._optimizer, parameter_groups(self.network))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer over `parameter_groups`, and the schedule over the steps that the trainer will take."""
        total_steps = self.trainer.estimated_stepping_batches
        if self._scheduler is not None and total_steps == float("inf"):
            raise ValueError("the schedule needs to know when training ends: set the trainer's max_epochs or max_steps")
        epochs = self.trainer.max_epochs or -1
        self._steps_per_epoch = total_steps / epochs if epochs > 0 and self.trainer.max_steps == -1 else None
        optimizer = self._made_optimizer()
        self._settings = _settings(optimizer)
        _check_same(self._loaded_settings, self._settings)
        if self._scheduler is None:
            return optimizer
        scheduler = _make("scheduler", self._scheduler, optimizer, total_steps=int(total_steps))
        _check_movable(scheduler, self._stretch(self._loaded_settings))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Take a step, and free the gradients: Lightning would keep them through the next forward pass."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def on_train_start(self) -> None:
        """Let settings of the optimizer and the schedule that were changed since the checkpoint take effect."""
        then, self._loaded_settings = self._loaded_settings, {}
        if then:
            schedules = [config.scheduler for config in self.trainer.lr_scheduler_configs]
            _change(self.trainer.optimizers[0], schedules, then["groups"], self._settings["groups"])
            stretch = self._stretch(then)
            for schedule in schedules:
                if isinstance(schedule, LambdaLR):
                    schedule.last_epoch = round(schedule.last_epoch * stretch)
                    _take_rates(schedule)

    def _stretch(self, then: dict[str, Any]) -> float:
        """How many steps there are for each of the checkpoint's."""
        before, now = then.get("steps_per_epoch"), self._steps_per_epoch
        return now / before if before and now else 1.0  # not known, or no step at all

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the settings that the optimizer was made with."""
        self._loaded_settings = checkpoint.get("optimizer_settings", {})
        if self._settings:  # of a strategy that reads the checkpoint behind configure_optimizers
            _check_same(self._loaded_settings, self._settings)
            for config in self.trainer.lr_scheduler_configs:
                _check_movable(config.scheduler, self._stretch(self._loaded_settings))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint self-describing."""
        checkpoint["optimizer_settings"] = {**self._settings, "steps_per_epoch": self._steps_per_epoch}
        if self.config is not None:
            checkpoint["config"] = self.config


def _settings(optimizer: Optimizer) -> dict[str, Any]:
    """The class of an optimizer, and what each of its groups was made with."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {"class": type(optimizer).__name__, "groups": groups}


def _check_same(then: dict[str, Any], now: dict[str, Any]) -> None:
    if then and (then["class"], len(then["groups"])) != (now["class"], len(now["groups"])):
        raise ValueError(
            f"optimizer: the checkpoint has the state of {then['class']} with {len(then['groups'])} groups of "
            f"parameters, which {now['class']} with {len(now['groups'])} cannot go on with; choose the optimizer of "
            f"the checkpoint, or begin another run"
        )


def _change(
    optimizer: Optimizer, schedules: Sequence[LRScheduler], then: list[dict[str, Any]], now: list[dict[str, Any]]
) -> None:
    """Sets what differs between two lists of settings; a schedule keeps its place, and scales another rate."""
    for index, (group, before, after) in enumerate(zip(optimizer.param_groups, then, now, strict=True)):
        group.update({key: value for key, value in after.items() if value != before.get(key) and key != "lr"})
        if before["lr"] != after["lr"]:
            group["lr"] = group["lr"] * after["lr"] / before["lr"] if before["lr"] else after["lr"]
            for schedule in schedules:
                schedule.base_lrs[index] = group["initial_lr"] = after["lr"]


def _check_movable(schedule: LRScheduler, stretch: float) -> None:
    """ValueError for a schedule that cannot be put to another place."""
    if stretch != 1 and not isinstance(schedule, LambdaLR):
        raise ValueError(
            f"scheduler: {type(schedule).__name__} cannot go on in epochs of {stretch:.3g} times as many steps; "
            f"keep data.batch_size, trainer.accumulate_grad_batches and the number of devices"
        )


def _take_rates(schedule: LambdaLR) -> None:
    """Sets the rates of its place, which the checkpoint has of a schedule of another length perhaps."""
    groups = schedule.optimizer.param_groups
    for group, rate, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = rate * factor(schedule.last_epoch)


def _make(what: str, factory: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return factory(*args, **kwargs)
    except (IndexError, TypeError, ValueError) as error:  # torch's own, for a value that it cannot use
        raise ValueError(f"{what}: {error}") from error
