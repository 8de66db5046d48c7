"""Directories of images, one folder for each class."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils.data import Subset

from revnet.data.class_folders import class_names, few, list_images
from revnet.data.datasets import Batch, FileImages, ReadableImages, TensorImages
from revnet.data.encoded_images import EncodedImages
from revnet.data.module import Images

__all__ = ["ImageFolder"]

log = logging.getLogger(__name__)


class ImageFolder(EncodedImages):
    """Images of any size and mode in `root/train/CLASS/`, `root/test/CLASS/` and, if wanted, `root/val/CLASS/`.

    Of `val` and `test` one is enough: it is the test then, and the validation split is cut from `train`. Other folders
    beside them are passed over, and so are files without the suffix of an image; what was found is logged. Images that
    fit into `memory_limit` are read once and held as bytes. Others, and those of which training takes crops of its own
    or changes the colours, are read by `num_workers` processes whenever they are needed.

    Args:
        root: directory with these folders.
        image_size: see `EncodedImages`.
        memory_limit: GiB that images may take in memory.
        skip_unreadable: go on where a file is damaged or no image. Images in memory lack it then; where they are read
            when they are needed, the next readable file of the split stands in for it. A warning at the end of the
            reading, or of an epoch, says how many there are and names the first.
        options: the other arguments of `EncodedImages`.

    Attributes:
        class_names: the folders in `train`, sorted; a label is the place among them.

    Raises:
        FileNotFoundError: if a folder is missing or has no classes in it.
        ValueError: if a class has no images, or test and training images have different classes. Images that cannot be
            read raise one with their path, when they are read.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from revnet.data import ImageFolder
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        ...     (root / name).mkdir(parents=True)
        ...     Image.new("RGB", (40, 30)).save(root / name / "1.png")
        >>> data = ImageFolder(root, image_size=32, val_fraction=0)
        >>> data.setup()
        >>> data.class_names, len(data.splits["train"]), data.image_shape
        (['cat', 'dog'], 2, (3, 32, 32))
    """

    class_names: Sequence[str]

    def __init__(
        self,
        root: str | PathLike[str],
        image_size: int = 32,
        *,
        memory_limit: float = 2.0,
        skip_unreadable: bool = False,
        **options: Any,
    ) -> None:
        if memory_limit < 0:
            raise ValueError(f"memory_limit={memory_limit}: give GiB, 0 to read images when they are needed")
        self.root = Path(root).expanduser()
        self.class_names = class_names(self.root / "train")
        super().__init__(len(self.class_names), image_size, **options)
        self.memory_limit = memory_limit
        self.skip_unreadable = skip_unreadable
        self._files: list[FileImages] = []
        self._reported = 0

    def load(self) -> tuple[Images, Images | None, Images]:
        """Find the files, and read them if they can be held."""
        held_out = held_out_splits(self.root)
        others = sorted(
            folder.name
            for folder in self.root.iterdir()
            if folder.is_dir() and folder.name not in ("train", "val", "test") and folder.name[0] != "."
        )
        if others:
            rank_zero_only(log.warning)(
                "%s: passed over, for they are none of train, val and test: %s", self.root, ", ".join(others)
            )
        self._files = [
            FileImages(*list_images(self.root / name, self.class_names), self.plain()) for name in ("train", *held_out)
        ]
        counts = ", ".join(f"{len(f):,} in {name}" for name, f in zip(("train", *held_out), self._files, strict=True))
        classes = len(self.class_names), few(self.class_names)
        rank_zero_only(log.info)("%s: images of %d classes (%s): %s", self.root, *classes, counts)
        read: list[Images] = [*self._files]
        gibibytes = sum(map(len, read)) * 3 * self.image_shape[1] ** 2 / 2**30
        if not self.varies and gibibytes <= self.memory_limit:
            read = [split.decode(self.image_shape, self.workers(split), self.skip_unreadable) for split in self._files]
            self.report_unreadable()
        return read[0], read[1] if len(read) == 3 else None, read[-1]

    def vary(self, images: Images) -> Images:
        """Crop at random places and change the colours, where that is wanted."""
        if isinstance(images, TensorImages):
            return images
        varied = copy.copy(images)  # which shares the marks of unreadable files
        varied.transform = self.varied()
        return varied

    def part(self, images: Images, indices: Sequence[int] | None = None) -> Images | Subset[Batch]:
        """Return those of the images that belong to a split, without unreadable ones where they are to be skipped."""
        if self.skip_unreadable and isinstance(images, FileImages):
            return ReadableImages(images, range(len(images)) if indices is None else indices)
        return super().part(images, indices)

    def report_unreadable(self) -> None:
        """Warn, in one line, if unreadable files have been found since the last time."""
        found = [path for files in self._files for path in files.unreadable_paths()]
        if len(found) > self._reported:
            self._reported = len(found)
            log.warning("%d unreadable images are skipped: %s", len(found), few(found))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Preprocess a batch, and report at the end of an epoch."""
        assert self.trainer is not None
        if self.trainer.training and self.trainer.is_last_batch:
            self.report_unreadable()
        return super().on_after_batch_transfer(batch, dataloader_idx)

    def teardown(self, stage: str) -> None:
        """Report what validation and test have come across."""
        self.report_unreadable()


def held_out_splits(root: Path) -> list[str]:
    """The names of those of the folders `val` and `test` that are there.

    Raises:
        FileNotFoundError: if neither is.
    """
    names = [name for name in ("val", "test") if (root / name).is_dir()]
    if not names:
        raise FileNotFoundError(f"{root} has neither test/ nor val/; put images into {root}/test/CLASS/")
    return names
