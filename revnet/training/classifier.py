"""The Lightning module that trains, validates and tests an image classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from revnet.training.fully_shard import FullyShard, shard
from revnet.training.task import Task

__all__ = ["Classifier"]


class Classifier(Task):
    """A network, a loss, and the factories of its optimizer and learning-rate schedule.

    Args:
        network: maps images of shape (batch, channels, height, width) to logits of shape (batch, classes).
        optimizer, scheduler, config: see `Task`.
        loss: maps logits and labels to a scalar; the cross-entropy if None.
        channels_last: run in the channels-last memory format, which convolutions in reduced precision prefer. The
            network's own weights are laid out again.
        norm_momentum: weight of one batch in the running statistics of batch normalisation; None leaves the network's
            own. The paper's 0.01 needs thousands of steps before validation means anything.
        test_time_flip: validate, test and predict by the mean of the logits of every image and its mirror image.

    Logged: `train/loss` per step, `{train,val,test}/accuracy` and `{val,test}/loss` per epoch, losses with the label
    smoothing of `loss`. No step waits for the device so that something can be logged.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from torch import nn
        >>> from revnet.training import Classifier
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
        >>> classifier = Classifier(network, partial(torch.optim.SGD, lr=0.1))
        >>> classifier(torch.zeros(5, 3, 2, 2)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None = None,
        scheduler: Callable[..., LRScheduler] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        channels_last: bool = False,
        norm_momentum: float | None = None,
        test_time_flip: bool = False,
        config: dict[str, Any] | None = None,
    ) -> None:
        if hasattr(network, "log_prob"):
            raise TypeError(f"network={type(network).__name__} gives densities and no logits: set task=density")
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        super().__init__(network.to(memory_format=memory_format), optimizer, scheduler, config)
        if norm_momentum is not None:
            for module in network.modules():
                if isinstance(module, _BatchNorm):
                    module.momentum = norm_momentum
        self.loss = loss if loss is not None else nn.CrossEntropyLoss()
        smoothing = getattr(self.loss, "label_smoothing", 0.0)
        if not 0 <= smoothing <= 1:
            raise ValueError(f"label_smoothing={smoothing}: give a share from 0 to 1")
        self._memory_format = memory_format
        self.test_time_flip = test_time_flip
        # Without validation of its arguments an update is a few asynchronous kernels.
        self.train_accuracy = MulticlassAccuracy(average="micro", validate_args=False)
        self.val_accuracy = MulticlassAccuracy(average="micro", validate_args=False)
        self.test_accuracy = MulticlassAccuracy(average="micro", validate_args=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, classes) for images of shape (batch, channels, height, width)."""
        return self.network(images.contiguous(memory_format=self._memory_format))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss of one batch."""
        loss = self._evaluate(batch, "train", self.train_accuracy)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Count one batch of the validation split."""
        loss = self._evaluate(batch, "val", self.val_accuracy)
        self.log("val/loss", loss, batch_size=len(batch[1]), sync_dist=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Count one batch of the test split."""
        loss = self._evaluate(batch, "test", self.test_accuracy)
        self.log("test/loss", loss, batch_size=len(batch[1]), sync_dist=True)

    def predict_step(self, batch: Tensor | Sequence[Tensor], batch_index: int) -> Tensor:
        """Return the logits of one batch, of images alone or with labels."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self._logits(images, self.test_time_flip)

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str, accuracy: Metric) -> Tensor:
        images, labels = batch
        logits = self._logits(images, self.test_time_flip and split != "train")
        # Labels of mixed images are shares of the classes, of which the largest counts.
        accuracy.update(logits.detach(), labels if labels.ndim == 1 else labels.argmax(dim=1))
        # Once an epoch, so that the progress bar does not wait for the device at every step.
        self.log(f"{split}/accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=True)
        return self.loss(logits, labels)

    def _logits(self, images: Tensor, flip: bool) -> Tensor:
        return (self(images) + self(images.flip(-1))) / 2 if flip else self(images)

    def configure_model(self) -> None:
        """Shard the network where the strategy asks for it."""
        strategy = None if self._trainer is None else self._trainer.strategy  # `load_from_checkpoint` has no trainer
        if isinstance(strategy, FullyShard):
            shard(self.network, strategy.device_mesh["data_parallel"])
