"""An average of the weights over the training, to validate, test and keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

__all__ = ["WeightAverage"]


class WeightAverage(WeightAveraging):
    """An exponential average of the weights, to validate, test and keep, while training goes on with its own.

    At every update, counted n = 0, 1, 2, ..., `average = d * average + (1 - d) * weights`, and the same for buffers,
    with d = min(decay, (1 + n) / (10 + n)), but for the first (n = 0), which copies the weights: early on the average
    reaches back over a ninth of the training, so that it is no worse for where the weights began. Checkpoints have the
    average as `state_dict` and the weights beside it.

    Lightning's own callback puts the weights of training back whenever a checkpoint is read, for a test as well.

    Source: Polyak, Juditsky 1992 (averages of the weights); the rise of d as in TensorFlow's ExponentialMovingAverage.

    Args:
        decay: of the average, once the training is long enough for it: it then reaches back 1 / (1 - decay) updates.
        update_every_n_steps: optimizer steps between two updates.

    Raises:
        ValueError: `decay` is not between 0 and 1, or `update_every_n_steps` is less than 1.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> from revnet.training import WeightAverage
        >>> trainer = Trainer(callbacks=[WeightAverage(decay=0.998, update_every_n_steps=10)], logger=False)
    """

    def __init__(self, decay: float = 0.998, update_every_n_steps: int = 10) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay}: give a number from 0 to 1")
        if update_every_n_steps < 1:
            raise ValueError(f"update_every_n_steps={update_every_n_steps}: give a number of steps, at least 1")
        super().__init__(avg_fn=_towards(decay))
        self.update_every_n_steps = update_every_n_steps

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to update after this step."""
        return step_idx is not None and step_idx % self.update_every_n_steps == 0

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the average in the network, also where the training that is gone on with has ended already."""
        self._copy_average_to_current(pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take both kinds of weights from a checkpoint that training goes on from."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


def _towards(decay: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def average(average: Tensor, weights: Tensor, updates: Tensor) -> Tensor:
        if not average.is_floating_point():  # a count of batches, a flag
            return weights
        kept = ((1 + updates) / (10 + updates)).clamp(max=decay)
        return torch.lerp(average, weights, (1 - kept).to(average.dtype))

    return average
