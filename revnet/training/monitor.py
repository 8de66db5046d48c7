"""Speed, memory and reconstruction error of a training, measured without slowing it down."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

__all__ = ["TrainingMonitor", "peak_memory"]

log = logging.getLogger(__name__)


class TrainingMonitor(Callback):
    """Log images per second, peak memory and the reconstruction error of every reversible sequence.

    Every `log_every_n_steps` optimizer steps of the trainer its loggers receive

    - `images_per_second`: images of the steps since the last entry over the time they took, validation excluded;
    - `peak_memory_mb`: see `peak_memory`;
    - `reconstruction_error/NAME`: the attribute `reconstruction_error` of the module NAME of the network, for every
      module that has one which is not None.

    The device is waited for at these steps alone. At the end of every epoch one line of the epoch's metrics goes to
    the logger `revnet.training.monitor` of Python's `logging`.

    Attributes:
        images_per_second: over the whole training, validation excluded; 0 before it.
        seconds_per_epoch: likewise.
        peak_memory_mb: at the end of the training.
        reconstruction_error: the largest at an entry, None if nothing has reported one.
    """

    def __init__(self) -> None:
        self.images_per_second = 0.0
        self.seconds_per_epoch = 0.0
        self.peak_memory_mb = 0.0
        self.reconstruction_error: float | None = None
        self._images = self._window_images = self._window_step = self._epochs = 0
        self._start = self._window_start = self._pause = self._paused = 0.0
        self._validated = False  # in this epoch

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._images = self._window_images = self._epochs = 0
        self._paused = 0.0
        self._validated = False
        self.reconstruction_error = None
        self._start = self._window_start = time.perf_counter()
        self._window_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images, and log where the trainer logs."""
        self._window_images += len(batch[0]) * trainer.world_size
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        step = trainer.global_step
        if interval > 0 and step % interval == 0 and step > self._window_step:  # the same steps in a resumed training
            self._log(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._pause = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the clock."""
        self._paused += time.perf_counter() - self._pause
        self._validated = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the epoch's metrics into the log."""
        self._epochs += 1
        names, self._validated = ("train", "val") if self._validated else ("train",), False
        splits = [text for split in names if (text := _figures(split, trainer.callback_metrics))]
        if trainer.is_global_zero:
            log.info("epoch %d: %s", trainer.current_epoch, ", ".join(splits))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sum up."""
        seconds = time.perf_counter() - self._start - self._paused
        self.images_per_second = (self._images + self._window_images) / seconds
        self.seconds_per_epoch = seconds / max(1, self._epochs)
        self.peak_memory_mb = peak_memory(pl_module.device) / 10**6
        self._errors(pl_module)

    def figures(self) -> dict[str, float]:
        """The attributes by name, without a reconstruction error that nothing reports."""
        names = ("images_per_second", "seconds_per_epoch", "peak_memory_mb", "reconstruction_error")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now = time.perf_counter() - self._paused
        metrics = {
            "images_per_second": self._window_images / (now - self._window_start),
            "peak_memory_mb": peak_memory(pl_module.device) / 10**6,
        }
        metrics |= {f"reconstruction_error/{name}": error for name, error in self._errors(pl_module).items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self._images += self._window_images
        self._window_images = 0
        self._window_start = now
        self._window_step = trainer.global_step

    def _errors(self, pl_module: pl.LightningModule) -> dict[str, float]:
        network = getattr(pl_module, "network", pl_module)
        errors = _reconstruction_errors(network)
        if errors:
            self.reconstruction_error = max([*errors.values(), self.reconstruction_error or 0.0])
        return errors


def _figures(split: str, metrics: Mapping[str, Tensor]) -> str:
    if f"{split}/accuracy" in metrics:
        return f"{split} accuracy {100 * metrics[f'{split}/accuracy']:.2f} % loss {metrics[f'{split}/loss']:.4f}"
    if f"{split}/nats" in metrics:
        return f"{split} {metrics[f'{split}/bits_per_dim']:.4f} bits/dim {metrics[f'{split}/nats']:.2f} nats"
    return ""


def _reconstruction_errors(network: nn.Module) -> dict[str, float]:
    errors: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        error = getattr(module, "reconstruction_error", None)
        if error is not None:
            errors[name] = error
    if not errors:
        return {}
    values = torch.stack(list(errors.values())).tolist()  # one transfer for all of them
    return dict(zip(errors, values, strict=True))


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest point so far.

    On a CUDA device those that torch has allocated there since the start of the training; elsewhere the resident set
    of the whole process since it was started, 0 where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
