"""Images in tar files, as `revnet-shards` writes them."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from revnet.data.datasets import Batch
from revnet.data.encoded_images import EncodedImages
from revnet.data.epochs import Places
from revnet.data.loader import Loader
from revnet.data.shard_batches import ShardBatches, ShardLoader
from revnet.data.shard_index import ShardIndex, need_webdataset

__all__ = ["ShardedImages"]


class ShardedImages(EncodedImages):
    """The images of a folder that `revnet-shards` has converted; what is done with them is as in `ImageFolder`.

    Files are read from front to back, which suits slow and distant disks. Of `val` and `test` one is enough: it is the
    test then, and whole shards of `train` are validated on. Needs `pip install 'revnet[shards]'`.

    Args:
        root: directory of the shards.
        image_size: see `EncodedImages`.
        buffer: images that a worker holds, as files, and draws the next one from. The shards have been shuffled when
            they were written.
        options: the other arguments of `EncodedImages`. The validation split takes `val_fraction` of the shards, at
            least one.

    Raises:
        FileNotFoundError: if there are no shards in `root`.
        ValueError: if shards are missing or cut short, from `setup`.
        ImportError: if webdataset is not installed.
    """

    def __init__(self, root: str | PathLike[str], image_size: int = 32, *, buffer: int = 500, **options: Any) -> None:
        if not isinstance(buffer, int) or buffer < 1:
            raise ValueError(f"buffer={buffer}: give a whole number of images, 1 not to shuffle within shards")
        need_webdataset()
        self.root = Path(root).expanduser()
        self.index = ShardIndex.read(self.root)
        super().__init__(len(self.index.classes), image_size, **options)
        self.class_names = self.index.classes
        self.buffer = buffer

    def setup(self, stage: str | None = None) -> None:
        """Check and split the shards and measure the images, once for all stages."""
        if self.splits:
            return
        self.index.check(self.root)
        splits = dict(self.index.splits)
        train = splits["train"]
        if len(splits) == 3:
            held_out = {"val": splits["val"], "test": splits["test"]}
        else:
            held_out = {"test": splits.get("test") or splits["val"]}
            if self.val_fraction > 0:
                if len(train) < 2:
                    raise ValueError(
                        f"val_fraction={self.val_fraction} takes whole shards, and {self.root} has one to train on: "
                        "convert with a smaller shard_size, or give 0"
                    )
                order = np.random.RandomState(self.split_seed).permutation(len(train))
                number = min(max(round(self.val_fraction * len(train)), 1), len(train) - 1)
                held_out["val"] = [train[place] for place in sorted(order[:number])]
                train = [train[place] for place in sorted(order[number:])]
        batches = {
            name: ShardBatches(self.root, shards, self.plain(), self.batch_size) for name, shards in held_out.items()
        }
        batches["train"] = ShardBatches(
            self.root,
            train,
            self.varied(),
            self.batch_size,
            training=True,
            buffer=self.buffer,
            seed=torch.initial_seed(),  # the same in every process, which `seed_everything` has seen to
        )
        self.num_workers = self.workers(batches["train"])
        # The images were shuffled when they were written: the first ones are a sample.
        measured = ShardBatches(self.root, train, self.plain(), 256)
        sample = range(min(8, len(measured)))
        self.normalize = self.normalized_by(measured[index][0] for index in sample)
        self.splits = batches

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training images in random order; what is left over for a batch of every process is dropped.

        Without a trainer every pass over the loader is the next epoch, as of `ImageDataModule`.
        """
        loader = self._loader(self.splits["train"])
        if not len(loader):
            raise ValueError(
                f"batch_size={self.batch_size} is more than each device's share of the training images in {self.root}: "
                "give less"
            )
        return loader

    def _loader(self, images: Dataset[Batch], kind: type[Loader] = ShardLoader, **options: Any) -> DataLoader[Batch]:
        assert isinstance(images, ShardBatches)
        if self.trainer is not None:
            images = images.of_process(self.trainer.global_rank, self.trainer.world_size)
        # Lightning puts no other in the place of such a sampler: every process has batches of its own already.
        places = Places(images, num_replicas=1, rank=0, shuffle=False)
        places.alone = self.trainer is None and images.training
        if self.trainer is not None:  # see `ImageDataModule.train_dataloader`
            places.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        return super()._loader(images, kind, batch_size=None, sampler=places, **options)
