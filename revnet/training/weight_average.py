"""An average of the weights over the training, to validate, test and keep."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.trainer.states import TrainerFn

from revnet.training.fully_shard import FullyShard

__all__ = ["WeightAverage"]


class WeightAverage(EMAWeightAveraging):
    """Lightning's `EMAWeightAveraging`, whose average is also what a test of a checkpoint uses.

    Every `update_every_n_steps` optimizer steps `average = decay * average + (1 - decay) * weights`, and the same for
    buffers. Validation, test and the `state_dict` of checkpoints use the average; training goes on with its own
    weights, which a checkpoint keeps beside it.

    Lightning's own puts the weights of training back whenever a checkpoint is read, for a test as well.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse weights that are shared out among devices: no device has all of them to average."""
        if isinstance(trainer.strategy, FullyShard):
            raise ValueError("callbacks=ema does not go with trainer=fsdp: average under trainer=ddp, or leave it out")
        super().setup(trainer, pl_module, stage)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take both kinds of weights from a checkpoint that training goes on from."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
