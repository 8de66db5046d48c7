"""The Lightning module that trains, validates and tests the density of a normalising flow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from revnet.training.task import Task

__all__ = ["DensityEstimator", "seeded"]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw the random numbers of a seed, and leave those of the training alone."""
    accelerated = device.type not in ("cpu", "meta")
    with torch.random.fork_rng([device] if accelerated else [], device_type=device.type if accelerated else "cuda"):
        torch.manual_seed(seed)
        yield


class DensityEstimator(Task):
    """Maximum likelihood: the loss is the mean of -log p(x) / D, in nats per dimension.

    Args:
        network: a `revnet.flows.Flow`. One with classes is given the labels as its `context`.
        optimizer, scheduler, config: see `Task`.

    Logged: `train/loss` per step; `{train,val,test}/nats`, the mean log-likelihood of an image (the higher the better),
    and `.../bits_per_dim` (the lower the better) per epoch. Both are of the data with the noise of dequantisation. For
    validation and test that noise is the same at every call.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from revnet.flows import nice
        >>> from revnet.training import DensityEstimator
        >>> estimator = DensityEstimator(nice((1, 4, 4), hidden=8, layers=1), partial(torch.optim.Adam, lr=1e-3))
        >>> estimator(torch.rand(5, 1, 4, 4), torch.zeros(5)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None = None,
        scheduler: Callable[..., LRScheduler] | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        if not hasattr(network, "log_prob"):
            raise TypeError(f"network={type(network).__name__} has no density: give a Flow, such as nice or realnvp")
        super().__init__(network, optimizer, scheduler, config)
        # Metrics, and not means of what is logged, so that a training that goes on within an epoch has them whole.
        names = [f"{split}_{name}" for split in ("train", "val", "test") for name in ("nats", "bits_per_dim")]
        self.means = nn.ModuleDict({name: MeanMetric(nan_strategy="disable") for name in names})

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Log-densities in nats, of shape (batch,)."""
        return self.network.log_prob(images, self.context(labels))  # type: ignore[operator]

    def context(self, labels: Tensor) -> Tensor | None:
        """What the flow is conditioned on."""
        return None if self.network.embedding is None else labels

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss of one batch."""
        loss = -self._evaluate(batch, "train") / self.network.dims  # type: ignore[operator]
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Count one batch of the validation split."""
        with seeded(batch_index, self.device):
            self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Count one batch of the test split."""
        with seeded(batch_index, self.device):
            self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> Tensor:
        nats = self(*batch)
        found = {"nats": nats.detach(), "bits_per_dim": self.network.bits_per_dim(nats.detach())}  # type: ignore[operator]
        for name, values in found.items():
            mean = self.means[f"{split}_{name}"]
            assert isinstance(mean, MeanMetric)
            mean.update(values)
            self.log(f"{split}/{name}", mean, on_step=False, on_epoch=True, prog_bar=name == "bits_per_dim")
        return nats.mean()
