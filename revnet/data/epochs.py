"""Epochs of a training, each in another order, that can be left after any batch and gone on with from there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import Dataset, DistributedSampler

from revnet.data.datasets import Batch, repeatable
from revnet.data.loader import Loader

__all__ = ["Places", "Epochs", "EpochLoader"]


class Places(DistributedSampler[int]):
    """What a process loads in an epoch, as places in all epochs on end: `epoch * len(dataset) + index`.

    The arguments are torch's.

    Attributes:
        start: how many places of an epoch are passed over.
        alone: whether no trainer chooses the epochs, so that each pass is the next one.
        begun: whether the epoch that was set last has been begun.

    Example:
        >>> from revnet.data.epochs import Places
        >>> places = Places(range(5), num_replicas=1, rank=0, shuffle=False)
        >>> places.set_epoch(1)
        >>> list(places)
        [5, 6, 7, 8, 9]
    """

    start = 0
    alone = False
    begun = False

    def set_epoch(self, epoch: int) -> None:
        """Choose what the next pass is."""
        super().set_epoch(epoch)
        self.begun = False

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * len(self.dataset)  # type: ignore[arg-type]
        return (first + index for index in islice(super().__iter__(), self.start, None))


class Epochs(Dataset[Batch]):
    """Images by their places in all epochs, so that a random transform varies from epoch to epoch.

    A batch is the same whenever it is asked for, by any process.

    Args:
        images: of one epoch; they hand out whole batches.
        seed: of a random transform.
    """

    def __init__(self, images: Any, seed: int) -> None:
        self.images = images
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, places: Sequence[int]) -> Batch:
        with repeatable(self.seed, *places):
            return self.images.__getitems__([place % len(self) for place in places])


class EpochLoader(Loader):
    """A loader that keeps its place: `state_dict` says how many batches of the epoch it has handed out.

    What they are is for the sampler to say, so the loader that goes on may have another number of processes; it must
    have batches of the same size.
    """

    _handed_out = 0  # of the present epoch
    _begin = 0  # of the next one, where it goes on with one

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        begin, self._begin = self._begin, 0
        self._handed_out = begin
        if isinstance(self.sampler, Places):
            if self.sampler.alone and self.sampler.begun:
                self.sampler.set_epoch(self.sampler.epoch + 1)
            self.sampler.begun = True
            self.sampler.start = begin * (self.batch_size or 1)
            return self._count(super().__iter__())
        return self._count(islice(super().__iter__(), begin, None))  # Lightning puts in a sampler of its own to overfit

    def _count(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the place in the epoch; the end of one is the beginning of the next."""
        return {"batches": self._handed_out % len(self), "batch_size": self._images()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next epoch begin there.

        Raises:
            ValueError: in the middle of an epoch, if its batches have another size.
        """
        if state["batches"] and state.get("batch_size", self._images()) != self._images():
            raise ValueError(
                f"batch_size={self._images()}: the checkpoint is of the middle of an epoch in batches of "
                f"{state['batch_size']}; go on with these, or from a checkpoint of an epoch's end"
            )
        self._begin = self._handed_out = state["batches"]

    def _images(self) -> int:
        """How many there are in a batch; a data set that hands out batches knows it itself."""
        return self.batch_size or self.dataset.batch_size  # type: ignore[attr-defined]
