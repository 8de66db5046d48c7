"""What all data modules have in common: splits, loaders, normalisation and augmentation."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from revnet.data.augment import cutout, mixing, random_crop, random_flip
from revnet.data.datasets import Batch, FileImages, TensorImages, whole_batch
from revnet.data.epochs import EpochLoader, Epochs, Places
from revnet.data.loader import Loader, leave_signals_to_the_trainer
from revnet.data.normalize import Normalize
from revnet.data.split import stratified_split
from revnet.processes import is_slurm_task

__all__ = ["ImageDataModule", "processors"]

Images = TensorImages | FileImages


class ImageDataModule(pl.LightningDataModule):
    """Loaders of labelled images for training, validation and test; a subclass says in `load` where they come from.

    A loader hands out bytes. On the device that a batch has been moved to it is normalised and, in training, augmented:
    shifted, mirrored, partly erased. Validation and test images are never augmented. The validation split is cut from
    the training images, so that the test images choose nothing.

    Args:
        image_shape: (channels, height, width).
        classes: how many the data has.
        num_classes: how many the caller expects; None for as many as there are.
        batch_size: images in a batch, on each device.
        num_workers: processes that load. None: none for images in memory, else this device's share of the
            processors, at most 16.
        val_fraction: share of the training images to validate on, the same of every class; 0 for no validation.
        split_seed: chooses the validation images; nothing else does.
        normalization: "mean_std", "mean_image", "symmetric", "imagenet" or "unit", see `Normalize.named`. The first two
            are measured on the training split.
        padding: pixels by which a training image is shifted at most, see `random_crop`.
        flip: mirror training images at random.
        cutout: side in pixels of the square erased from every training image; 0 for none.
        mixup: mix training images and their labels, which then are shares of the classes, see `mixing`; 0 for none.
        cutmix: likewise, with rectangles.

    Attributes:
        image_shape, num_classes: of the data; known from the start.
        class_names: what the labels mean, in their order, where the data says so; else None.
        splits: the data sets "train", "test" and, if there is validation, "val", after `setup`.

    A checkpoint of the trainer keeps what the images were normalised by, and what the labels mean.

    Raises:
        ValueError: an argument that cannot be.

    Example:
        >>> from revnet.data import Digits
        >>> data = Digits(batch_size=100)
        >>> data.setup()
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.dtype, data.preprocess(images, training=True).shape
        (torch.uint8, torch.Size([100, 3, 8, 8]))
    """

    class_names: Sequence[str] | None = None

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        classes: int,
        *,
        num_classes: int | None = None,
        batch_size: int = 128,
        num_workers: int | None = None,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        normalization: str = "mean_std",
        padding: int = 4,
        flip: bool = True,
        cutout: int = 0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__()
        if num_classes not in (None, classes):
            raise ValueError(
                f"data has {classes} classes, num_classes={num_classes}: leave num_classes out or choose other data"
            )
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give a whole number of images, at least 1")
        if num_workers is not None and (not isinstance(num_workers, int) or num_workers < 0):
            raise ValueError(f"num_workers={num_workers}: give a whole number of processes, 0 for none")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction}: give a share from 0 (no validation) to less than 1")
        if not isinstance(split_seed, int) or not 0 <= split_seed < 2**32:
            raise ValueError(f"split_seed={split_seed}: give a whole number from 0 to 2**32 - 1")
        if normalization not in Normalize.NAMES:
            raise ValueError(f"normalization={normalization!r}: valid are {', '.join(Normalize.NAMES)}")
        if normalization == "imagenet" and image_shape[0] != 3:
            raise ValueError(
                f"normalization='imagenet' is for 3 channels, the images have {image_shape[0]}: use mean_std"
            )
        for name, pixels in {"padding": padding, "cutout": cutout}.items():
            if not isinstance(pixels, int) or pixels < 0:
                raise ValueError(f"{name}={pixels}: give a whole number of pixels, 0 for none")
        for name, strength in {"mixup": mixup, "cutmix": cutmix}.items():
            if strength < 0:
                raise ValueError(f"{name}={strength}: give a strength of more than 0, such as 0.2, or 0 for none")
        self.image_shape = image_shape
        self.num_classes = classes
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.normalization = normalization
        self.padding = padding
        self.flip = flip
        self.cutout = cutout
        self.mixup = mixup
        self.cutmix = cutmix
        self.splits: dict[str, Any] = {}
        self._trained_with: Normalize | None = None
        self._seed: int | None = None

    def load(self) -> tuple[Images, Images | None, Images]:
        """Return the images to train on, to validate on (None: to be cut from the former) and to test on."""
        raise NotImplementedError(f"{type(self).__name__} must define `load`")

    def vary(self, images: Images) -> Images:
        """Return the training images as training reads them, if it reads them in a way of its own."""
        return images

    def part(self, images: Images, indices: Sequence[int] | None = None) -> Images | Subset[Batch]:
        """Return those of the images that belong to a split, None for all."""
        return images if indices is None else Subset(images, indices)

    def workers(self, images: Dataset[Batch]) -> int:
        """Return how many processes load these images: by default a device's share of the processors, 16 at most."""
        if self.num_workers is not None:
            return self.num_workers
        if isinstance(images, TensorImages):
            return 0
        devices = 1 if _has_share() or not self.trainer else self.trainer.num_devices
        return min(16, max(1, processors() // devices))

    def setup(self, stage: str | None = None) -> None:
        """Load, split and measure, once for all stages."""
        if self.splits:
            return
        train, val, test = self.load()
        self.num_workers = self.workers(train)
        kept = list(range(len(train)))
        splits = {"test": self.part(test)}
        if val is not None:
            splits["val"] = self.part(val)
        elif self.val_fraction > 0:
            kept, rest = stratified_split(train.labels, self.val_fraction, self.split_seed)
            splits["val"] = self.part(train, rest)
        splits["train"] = self.part(self.vary(train), kept)
        # To measure files is to decode them: a few thousand of them, evenly spaced, will do.
        sample = kept if isinstance(train, TensorImages) else kept[:: max(1, len(kept) // 2048)]
        measured = self.part(train, sample)
        self.normalize = self.normalized_by(_batches_of(measured, self.num_workers))
        self.splits = splits

    def normalized_by(self, batches: Iterable[Tensor]) -> Normalize:
        """Return what a checkpoint says that its network was trained with, else what these images call for."""
        return self._trained_with or Normalize.named(self.normalization, batches)

    def state_dict(self) -> dict[str, Any]:
        """Return what the images are normalised by, and what the labels mean."""
        names = None if self.class_names is None else list(self.class_names)
        return {"normalization": self.normalization, **self.normalize.state_dict(), "class_names": names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Normalise the images, whatever they are, by what a network was trained with, unless told to do otherwise.

        Raises:
            ValueError: what it was trained with is a mean image of another shape, or has other classes.
        """
        names = state.get("class_names")
        if names is not None and self.class_names is not None and names != list(self.class_names):
            pairs = zip_longest(names, self.class_names, fillvalue="nothing")
            first, now = next((there, here) for there, here in pairs if there != here)
            raise ValueError(
                f"the network was trained on classes of which one is {first}, and these data have {now} in its place: "
                f"give both the same class folders"
            )
        if state["normalization"] != self.normalization:
            return
        shape = tuple(state["shift"].shape)
        if any(size not in (1, there) for size, there in zip(shape, self.image_shape, strict=False)):
            raise ValueError(
                f"normalization={self.normalization}: the network was trained with one of shape {shape}, which images "
                f"of shape {self.image_shape} do not fit; bring them to that shape, or choose another normalization"
            )
        self._trained_with = self.normalize = Normalize(state["shift"], state["scale"])

    def preprocess(self, images: Tensor, training: bool) -> Tensor:
        """Turn bytes into the input of a network: normalised and, for training, augmented.

        Args:
            images: a batch from a loader of this module, (batch, channels, height, width), on any device.
            training: whether to augment.
        """
        images = self.normalize.to(images.device)(images)
        if training and self.padding:
            images = random_crop(images, self.padding)
        if training and self.flip:
            images = random_flip(images)
        if training and self.cutout:
            images = cutout(images, self.cutout)
        return images

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Preprocess a batch on its device, in the trainer's precision."""
        images, labels = batch
        assert self.trainer is not None
        images = self.preprocess(images, training=self.trainer.training)
        if self.trainer.training and (mix := mixing(self.mixup, self.cutmix, self.num_classes)) is not None:
            images, labels = mix(images, labels)
        return self.trainer.precision_plugin.convert_input((images, labels))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training images in random order; what is left over for an incomplete batch is dropped.

        Torch's seed and the epoch decide the order and all random changes of the images but those of `preprocess`, and
        the loader's `state_dict` keeps its place in it, whatever the number of its processes. Without a trainer every
        pass over the loader is the next epoch, so make it once; `loader.sampler.set_epoch(epoch)` chooses one.

        Raises:
            ValueError: there are fewer images than a batch takes.
        """
        images = len(self.splits["train"]) // (self.trainer.world_size if self.trainer else 1)
        if images < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} is more than the {images} training images: give {images} or less"
            )
        seed = torch.initial_seed()
        self._seed = seed if self.trainer is None else self.trainer.strategy.broadcast(seed)
        order = self._order()
        order.alone = self.trainer is None
        if self.trainer is not None:  # a loader with processes begins to load before the trainer says which epoch it is
            order.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        return self._loader(Epochs(self.splits["train"], order.seed), EpochLoader, sampler=order, drop_last=True)

    def batch_indices(self, epoch: int, batch: int) -> list[int]:
        """Return which images a training batch holds on this device.

        Args:
            epoch: counted from 0.
            batch: its place in the epoch, counted from 0.

        Returns:
            Indices of the training images that `load` returns; none where the data cannot tell.
        """
        train = self.splits["train"]
        if not isinstance(train, Subset) or getattr(self.trainer, "overfit_batches", 0) > 0:
            return []  # Lightning puts another order in the place of this module's to overfit on a few batches
        order = self._order()
        order.set_epoch(epoch)
        places = list(order)[batch * self.batch_size : (batch + 1) * self.batch_size]
        return [train.indices[place % len(train)] for place in places]

    def val_dataloader(self) -> DataLoader[Batch] | list:
        """Return the validation images in their order; no loader if there are none."""
        return self._loader(self.splits["val"]) if "val" in self.splits else []

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test images in their order."""
        return self._loader(self.splits["test"])

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the test images in their order."""
        return self.test_dataloader()

    def _order(self) -> Places:
        """The order of the training images on this device, which asks no other process anything."""
        world_size, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        seed = torch.initial_seed() if self._seed is None else self._seed
        return Places(self.splits["train"], world_size, rank, seed=seed, drop_last=True)

    def _loader(self, images: Dataset[Batch], kind: type[Loader] = Loader, **options: Any) -> DataLoader[Batch]:
        workers = self.num_workers or 0
        sampler = options.get("sampler")
        # A generator of its own: to begin an epoch leaves torch's global one alone.
        seed = sampler.seed + sampler.epoch if sampler is not None else 0
        return kind(
            images,
            options.pop("batch_size", self.batch_size),
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=whole_batch,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            generator=torch.Generator().manual_seed(seed % 2**63),
            worker_init_fn=leave_signals_to_the_trainer,
            **options,
        )


def _has_share() -> bool:
    """Whether this process is a task to which Slurm has given a number of processors."""
    return is_slurm_task() and "SLURM_CPUS_PER_TASK" in os.environ


def processors() -> int:
    """How many this process may use. A task of Slurm's is not always bound to its share."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(bound, int(os.environ["SLURM_CPUS_PER_TASK"])) if _has_share() else bound


def _batches_of(images: Images | Subset[Batch], num_workers: int) -> Iterator[Tensor]:
    """The images in batches; no process is started before the first one is asked for."""
    for batch, _ in DataLoader(images, 256, num_workers=num_workers, collate_fn=whole_batch):
        yield batch
