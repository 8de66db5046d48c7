"""Training with the parameters, gradients and optimizer state shared out among the devices (FSDP)."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from revnet.reversible import ReversibleSequence

__all__ = ["FullyShard", "shard"]


class FullyShard(ModelParallelStrategy):
    """Lightning's strategy for torch's `fully_shard`, over all devices of all nodes.

    The module that is trained calls `shard` in its hook `configure_model`. Checkpoints are ordinary single files, which
    any other strategy reads.

    Args:
        timeout: of a process that waits for the others.
    """

    def __init__(self, timeout: timedelta) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)

    def connect(self, model: pl.LightningModule) -> None:
        """Take the module that is to be trained.

        Raises:
            ValueError: it cannot be sharded: a flow, since what is sharded is gathered by a network's forward pass,
                which a flow does not have, or weights of which an average is kept, since no device has all of them; or
                its normalisation is to be synchronised, which this strategy does not do.
        """
        if hasattr(getattr(model, "network", None), "log_prob"):
            raise ValueError("trainer=fsdp is for classifiers: train a flow with trainer=ddp")
        if any(isinstance(callback, WeightAveraging) for callback in model.trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError("callbacks=ema does not go with trainer=fsdp: average under trainer=ddp, or leave it out")
        if self._layer_sync is not None:
            raise ValueError("trainer.sync_batchnorm=true does not go with trainer=fsdp: take trainer=ddp, or false")
        super().connect(model)

    def setup_environment(self) -> None:
        """Make all processes one group of data parallelism."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard(network: nn.Module, mesh: Any) -> None:
    """Shard the parameters of every reversible sequence of a network, and what is left, over a mesh of devices.

    A sequence gathers its parameters for its forward and for its backward pass and gives them back after each; its
    branches, which both passes evaluate, are not sharded one by one.

    Args:
        network: sharded in place, once: another call changes nothing.
        mesh: one-dimensional, of `torch.distributed.device_mesh`.
    """
    for module in [*network.modules()][::-1]:  # sequences inside others first, the network last
        wanted = isinstance(module, ReversibleSequence) or module is network
        if wanted and not isinstance(module, FSDPModule):
            fully_shard(module, mesh=mesh)
