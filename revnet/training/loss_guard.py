"""A training stops where its loss or its weights are no longer finite."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from revnet.flows import NonFiniteError

__all__ = ["LossGuard"]

SHOWN = 8  # images in a message


class _Step(NamedTuple):
    number: int
    epoch: int
    batch: int


class LossGuard(Callback):
    """Raise at a loss that is nan or infinite, and keep what comes of it out of every checkpoint.

    The error names the step, the images of the batch (if the data module tells them, see
    `ImageDataModule.batch_indices`) and the largest reconstruction error. On a CPU the loss is looked at before its
    backward pass, so that the step is not taken. On an accelerator it is copied in the background and looked at when it
    has arrived, so that no step waits for the device; a checkpoint waits for what is on its way, and is not written if
    a loss or a weight is not finite. A flow finds by itself that its values are not finite; its error is told where in
    the training it came.

    Raises:
        ValueError: at such a loss, and at such a weight when a checkpoint is to be written.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[Tensor, torch.Event, _Step]] = deque()
        self._reversible: dict[str, nn.Module] = {}
        self._drift: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the modules that report a reconstruction error."""
        network = getattr(pl_module, "network", pl_module)
        self._reversible = {name: m for name, m in network.named_modules() if hasattr(m, "reconstruction_error")}

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Take the loss of a batch."""
        step = self._step(trainer)
        loss = loss.detach()
        if loss.device.type == "cpu":
            self._judge(float(loss), step, trainer)
            return
        on_host = torch.empty_like(loss, device="cpu", pin_memory=True).copy_(loss, non_blocking=True)
        arrived = torch.Event(loss.device.type)
        arrived.record()
        self._pending.append((on_host, arrived, step))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at what has arrived."""
        while self._pending and self._pending[0][1].query():
            self._judge_next(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the reconstruction errors at hand, where they are."""
        errors = {name: module.reconstruction_error for name, module in self._reversible.items()}
        self._drift = {name: error for name, error in errors.items() if isinstance(error, Tensor)}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Wait for every loss, and look at the weights."""
        self._judge_all(trainer)
        weights = {name: t for name, t in checkpoint["state_dict"].items() if t.is_floating_point() and t.numel()}
        if not weights:
            return
        finite = torch.stack([tensor.isfinite().all() for tensor in weights.values()]).tolist()
        bad = [name for name, good in zip(weights, finite, strict=True) if not good]
        if bad:
            raise ValueError(
                f"{bad[0]} is not finite after step {trainer.global_step}{self._errors()}: the training diverges and "
                "this checkpoint is not written; resume the one before with a lower optimizer.lr or with "
                "trainer.gradient_clip_val"
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say where a flow has met values that are not finite."""
        if isinstance(exception, NonFiniteError) and trainer.training:
            exception.args = (f"{exception} (at {_where(trainer, self._step(trainer))}{self._errors()})",)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the last losses."""
        self._judge_all(trainer)

    def _judge_all(self, trainer: pl.Trainer) -> None:
        while self._pending:
            self._judge_next(trainer)

    def _judge_next(self, trainer: pl.Trainer) -> None:
        on_host, arrived, step = self._pending.popleft()
        arrived.synchronize()
        self._judge(float(on_host), step, trainer)

    def _judge(self, loss: float, step: _Step, trainer: pl.Trainer) -> None:
        if math.isfinite(loss):
            return
        self._pending.clear()
        raise ValueError(
            f"the loss is {loss} at {_where(trainer, step)}{self._errors()}: the training diverges or these images are "
            "bad; resume the last checkpoint with a lower optimizer.lr or with trainer.gradient_clip_val"
        )

    @staticmethod
    def _step(trainer: pl.Trainer) -> _Step:
        return _Step(trainer.global_step + 1, trainer.current_epoch, trainer.fit_loop.batch_idx)

    def _errors(self) -> str:
        errors = {name: float(error) for name, error in self._drift.items()}
        if not errors:
            return ""
        name = max(errors, key=lambda name: (not math.isfinite(errors[name]), errors[name]))
        return f", the largest reconstruction error last seen is {errors[name]:.1e}, in {name!r}"


def _where(trainer: pl.Trainer, step: _Step) -> str:
    return f"step {step.number} (epoch {step.epoch}, batch {step.batch}{_images(trainer, step)})"


def _images(trainer: pl.Trainer, step: _Step) -> str:
    tell = getattr(trainer.datamodule, "batch_indices", None)  # type: ignore[attr-defined]
    indices = tell(step.epoch, step.batch) if tell is not None else []
    if not indices:
        return ""
    more = f" and {len(indices) - SHOWN} more, see batch_indices of the data module" if len(indices) > SHOWN else ""
    return f", training images {', '.join(map(str, indices[:SHOWN]))}{more}"
