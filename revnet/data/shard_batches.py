"""Batches of images that are streamed from shards."""

from __future__ import annotations

import io
import logging
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from revnet.data.datasets import Batch, repeatable
from revnet.data.epochs import EpochLoader
from revnet.data.read_image import read_image
from revnet.data.shard_index import Shard

__all__ = ["ShardBatches", "ShardLoader"]

log = logging.getLogger(__name__)


class ShardBatches(Dataset[Batch]):
    """The batches of one process of a training, those of all epochs on end; an index from 0 gives one of them.

    In every epoch the images of all shards, in the order of the epoch, are cut into equal parts, one for each process
    and in that one for each worker of its data loader, in the middle of a shard where need be. A worker streams its
    part. So every process gets the same number of batches, whatever the number of shards.

    Args:
        directory: of the shards.
        shards: as the index says.
        transform: from an RGB image to a tensor of bytes, (channels, height, width), of the same shape for all.
        batch_size: images in a batch.
        training: shuffle the shards anew in every epoch, and the images in a buffer, and drop the images that are too
            few for a batch of every process. Else the order is that of the shards, and where the images are too few
            for the last process, the first ones are repeated.
        buffer: images among which the next one is drawn in training.
        seed: of order and transforms.
        rank: number of this process.
        world_size: how many processes there are.
    """

    def __init__(
        self,
        directory: Path,
        shards: Sequence[Shard],
        transform: Callable[[Image.Image], Tensor],
        batch_size: int,
        *,
        training: bool = False,
        buffer: int = 500,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.directory = directory
        self.shards = shards
        self.transform = transform
        self.batch_size = batch_size
        self.training = training
        self.buffer = buffer
        self.seed = seed
        self.rank = rank
        count = sum(shard.count for shard in shards)
        if training:
            self.images = count // (world_size * batch_size) * batch_size  # of this process
        else:
            self.images = -(-count // world_size)
        self._part: tuple[int, int] | None = None  # epoch and worker
        self._stream: Iterator[list[dict[str, Any]]] = iter(())
        self._next = 0

    def of_process(self, rank: int, world_size: int) -> ShardBatches:
        """Those of another process, or of as many as there are now."""
        return ShardBatches(
            self.directory,
            self.shards,
            self.transform,
            self.batch_size,
            training=self.training,
            buffer=self.buffer,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def __len__(self) -> int:
        return -(-self.images // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        epoch, batch = divmod(index, len(self))
        worker = get_worker_info()
        workers = 1 if worker is None else worker.num_workers
        part = (epoch, batch % workers)
        if part != self._part or batch < self._next:
            self._part, self._next = part, part[1]
            self._stream = self._batches(*part, workers)
        # More than one only if training goes on in the middle of an epoch: those before are passed over undecoded.
        for _ in range(self._next, batch + 1, workers):
            samples = next(self._stream)
        self._next = batch + workers
        with repeatable(self.seed, self.rank, index):
            images = torch.stack([self.transform(_image(sample)) for sample in samples])
        return images, torch.tensor([int(sample["cls"]) for sample in samples])

    def _batches(self, epoch: int, worker: int, workers: int) -> Iterator[list[dict[str, Any]]]:
        """What one worker streams: its batches of undecoded images."""
        shares = [len(range(number, len(self), workers)) * self.batch_size for number in range(workers)]
        first = sum(shares[:worker])
        start, stop = (self.rank * self.images + min(place, self.images) for place in (first, first + shares[worker]))
        samples = self._samples(epoch, start, stop)
        if self.training:
            from webdataset import shuffle

            order = random.Random(repr((self.seed, epoch, self.rank, worker)))
            samples = shuffle(self.buffer, initial=self.buffer, rng=order)(samples)
        while batch := list(islice(samples, self.batch_size)):
            yield batch

    def _samples(self, epoch: int, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Those of the images from place `start` to `stop` of the epoch, which repeats the shards if it must."""
        shards = list(self.shards)
        if self.training:
            random.Random(repr((self.seed, epoch))).shuffle(shards)  # the same in every process
        begin = 0
        for shard in cycle(shards):
            if begin >= stop:
                return
            inside = range(max(start - begin, 0), min(stop - begin, shard.count))
            if inside:
                with closing(_read(self.directory / shard.file)) as samples:
                    yield from islice(samples, inside.start, inside.stop)
            begin += shard.count


def _read(file: Path) -> Generator[dict[str, Any], None, None]:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with file.open("rb") as stream:
        yield from group_by_keys(tar_file_expander([{"url": str(file), "stream": stream}]))


def _image(sample: dict[str, Any]) -> Image.Image:
    suffix = next(name for name in sample if not name.startswith("__") and name != "cls")
    return read_image(io.BytesIO(sample[suffix]), f"{sample['__url__']}: {sample['__key__']}.{suffix}")


class ShardLoader(EpochLoader):
    """Its processes stream a part of the epoch each, so that as many have to go on with one as have begun it."""

    def state_dict(self) -> dict[str, int]:
        """Return the place in the epoch, and in how many parts it is streamed."""
        return super().state_dict() | {"parts": max(self.num_workers, 1)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next epoch begin there, with as many processes."""
        super().load_state_dict(state)
        if state["parts"] != max(self.num_workers, 1):
            log.warning(
                "num_workers=%d, as in the training that is gone on with, and not %d: they read a part each",
                *(state["parts"], self.num_workers),
            )
            self.num_workers, self.prefetch_factor = state["parts"], self.prefetch_factor or 2
