"""Pictures of what a flow has learnt so far."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid, save_image

from revnet.training.density import DensityEstimator, seeded

__all__ = ["SampleGrids"]


class SampleGrids(Callback):
    """Draw samples, reconstructions and interpolations of a flow at a validation; do nothing for other networks.

    - `samples`: of the same latent vectors every time, each column of one class where the flow has classes;
    - `reconstructions`: validation images, and below each of them what decoding its latent vector gives;
    - `interpolations`: each row from one validation image to another.

    Written as `DIRPATH/samples_EPOCH.png` and so on, and to TensorBoard where there is its logger.

    Args:
        dirpath: directory of the pictures, made if it is not there.
        every_n_epochs: epochs between pictures, at least 1; they are drawn at the first validation from then on.
        rows: of images in a picture, at least 1.
        columns: likewise, at least 2.

    Raises:
        ValueError: one of the numbers is too small.
    """

    def __init__(
        self, dirpath: str | os.PathLike[str], every_n_epochs: int = 5, rows: int = 8, columns: int = 10
    ) -> None:
        least = {"every_n_epochs": (every_n_epochs, 1), "rows": (rows, 1), "columns": (columns, 2)}
        for name, (value, minimum) in least.items():
            if not isinstance(value, int) or value < minimum:
                raise ValueError(f"{name}={value}: give a whole number, at least {minimum}")
        self.dirpath = Path(dirpath)
        self.every_n_epochs = every_n_epochs
        self.rows = rows
        self.columns = columns
        self._drawn = 0  # the last epoch with pictures

    def state_dict(self) -> dict[str, Any]:
        """Return when the last pictures were drawn."""
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._drawn = state["drawn"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew with another training."""
        self._drawn = min(self._drawn, trainer.current_epoch)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw, with the first images and the weights that are validated."""
        epoch = trainer.current_epoch + 1
        if (
            not isinstance(pl_module, DensityEstimator)
            or trainer.sanity_checking
            or epoch // self.every_n_epochs == self._drawn // self.every_n_epochs
            or batch_idx > 0
            or not trainer.is_global_zero
        ):
            return
        self._drawn = epoch
        with torch.no_grad(), seeded(0, pl_module.device):
            pictures = self._pictures(pl_module, *batch)
        self.dirpath.mkdir(parents=True, exist_ok=True)
        for name, (images, columns) in pictures.items():
            grid = make_grid(images.float().clamp(0, 1), nrow=columns)
            save_image(grid, self.dirpath / f"{name}_{epoch:04}.png")
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(name, grid, epoch)

    def _pictures(self, estimator: DensityEstimator, images: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, int]]:
        """The images of each picture, row by row, and how many stand in a row."""
        flow: Any = estimator.network
        count = self.rows * self.columns
        classes = torch.arange(count, device=images.device) % self.columns
        if flow.embedding is not None:
            classes = classes % flow.embedding.num_embeddings
        across = min(self.columns, len(images))
        down = min(max(1, self.rows // 2), len(images) // across)
        seen, context = images[: across * down], estimator.context(labels[: across * down])
        again = flow.decode(flow.encode(seen, context), context)
        pairs = torch.stack((seen.unflatten(0, (down, across)), again.unflatten(0, (down, across))), 1)
        pairs_of_ends = min(self.rows, (len(images) + 1) // 2)
        first, last = images[:pairs_of_ends], images[-pairs_of_ends:]
        path = flow.interpolate(first, last, self.columns, estimator.context(labels[:pairs_of_ends]))
        return {
            "samples": (flow.sample(count, context=estimator.context(classes)), self.columns),
            "reconstructions": (pairs.flatten(0, 2), across),
            "interpolations": (path.transpose(0, 1).flatten(0, 1), self.columns),
        }
