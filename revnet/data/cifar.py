"""CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from revnet.data.datasets import TensorImages
from revnet.data.module import ImageDataModule

__all__ = ["CIFAR10", "CIFAR100"]


class CIFAR10(ImageDataModule):
    """60,000 photographs of 32x32 pixels in 10 classes; the official 10,000 are the test.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Args:
        root: directory with the official archive, as it is or unpacked.
        download: fetch the archive if it is not there.
        options: the arguments of `ImageDataModule`.

    Raises:
        FileNotFoundError: from `prepare_data` or `setup`, if the data is not there, damaged, or cannot be fetched.
    """

    source: type[datasets.CIFAR10] = datasets.CIFAR10
    classes = 10

    def __init__(self, root: str | PathLike[str], download: bool = False, **options: Any) -> None:
        super().__init__((3, 32, 32), self.classes, **options)
        self.root = Path(root).expanduser()
        self.download = download

    def prepare_data(self) -> None:
        """Unpack the archive, after fetching it where that is allowed."""
        archive = self.root / self.source.filename
        whole = check_integrity(archive, self.source.tgz_md5)
        if self.download or whole:
            try:
                self.source(self.root, download=True)
            except (OSError, RuntimeError) as error:
                if whole:
                    raise FileNotFoundError(
                        f"root={self.root}: {archive.name} cannot be unpacked ({error}); unpack it yourself, or make "
                        f"the directory writable and its disk large enough"
                    ) from None
                raise FileNotFoundError(
                    f"root={self.root}: {self.source.__name__} cannot be fetched from {self.source.url} ({error}); "
                    f"get {self.source.filename} in another way and put it there"
                ) from None

    def load(self) -> tuple[TensorImages, None, TensorImages]:
        """Read the unpacked archive."""
        return self._read(train=True), None, self._read(train=False)

    def _read(self, train: bool) -> TensorImages:
        try:
            read = self.source(self.root, train=train)
        except RuntimeError:
            raise FileNotFoundError(
                f"root={self.root}: {self.source.__name__} is not there or damaged; fetch it with data.download=true "
                f"(in Python download=True, then prepare_data()), or put {self.source.filename} there"
            ) from None
        images = torch.from_numpy(read.data).permute(0, 3, 1, 2).contiguous()
        return TensorImages(images, torch.tensor(read.targets))


class CIFAR100(CIFAR10):
    """60,000 photographs of 32x32 pixels in 100 classes; the official 10,000 are the test. As `CIFAR10`."""

    source = datasets.CIFAR100
    classes = 100
