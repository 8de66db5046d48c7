"""MNIST."""

from __future__ import annotations

import gzip
import zlib
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from revnet.data.datasets import TensorImages
from revnet.data.module import ImageDataModule

__all__ = ["MNIST"]

FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


class MNIST(ImageDataModule):
    """70,000 handwritten digits of 28x28 pixels; the official 10,000 are the test.

    Validation uses the last `val_fraction` of the training images in their official order, as is usual for MNIST:
    1/6 of them are the last 10,000.

    Source: LeCun, Bottou, Bengio, Haffner, Gradient-Based Learning Applied to Document Recognition, 1998.

    Args:
        root: directory with the four official files (`train-images-idx3-ubyte` and so on), or with torchvision's layout
            `MNIST/raw` of them; each as it is or compressed (`.gz`).
        download: fetch them, into torchvision's layout, if they are not there.
        channels: 1, or 3 for the grey repeated, as networks for coloured images take it.
        padding: see `ImageDataModule`.
        flip: likewise; digits are not the same when mirrored.
        options: the other arguments of `ImageDataModule`.

    Raises:
        FileNotFoundError: from `prepare_data` or `setup`, if a file is not there or cannot be fetched.
        ValueError: from `setup`, if a file is damaged.
    """

    def __init__(
        self,
        root: str | PathLike[str],
        download: bool = False,
        *,
        channels: int = 3,
        padding: int = 2,
        flip: bool = False,
        **options: Any,
    ) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels={channels}: give 1, or 3 for the grey repeated")
        super().__init__((channels, 28, 28), 10, padding=padding, flip=flip, **options)
        self.root = Path(root).expanduser()
        self.download = download

    def prepare_data(self) -> None:
        """Fetch the files where that is allowed."""
        if self.download and not all(map(self._file, FILES)):
            try:
                datasets.MNIST(self.root, download=True)
            except (OSError, RuntimeError) as error:
                raise FileNotFoundError(
                    f"root={self.root}: MNIST cannot be fetched ({error}); get its four files in another way and put "
                    f"them there"
                ) from None

    def load(self) -> tuple[TensorImages, TensorImages | None, TensorImages]:
        """Read the files."""
        train, test = self._read("train"), self._read("t10k")
        held_out = round(self.val_fraction * len(train))
        if not held_out:
            return train, None, test
        kept = len(train) - held_out
        return (
            TensorImages(train.images[:kept], train.labels[:kept]),
            TensorImages(train.images[kept:], train.labels[kept:]),
            test,
        )

    def _read(self, part: str) -> TensorImages:
        images = self._array(f"{part}-images-idx3-ubyte", dimensions=3)
        labels = self._array(f"{part}-labels-idx1-ubyte", dimensions=1)
        return TensorImages(images[:, None].repeat(1, self.image_shape[0], 1, 1), labels.long())

    def _file(self, name: str) -> Path | None:
        places = [folder / f"{name}{end}" for folder in (self.root, self.root / "MNIST/raw") for end in ("", ".gz")]
        return next((place for place in places if place.is_file()), None)

    def _array(self, name: str, dimensions: int) -> Tensor:
        """The bytes in a file of the IDX format: two zeros, type, number of dimensions, each size, the data."""
        path = self._file(name)
        if path is None:
            raise FileNotFoundError(
                f"root={self.root}: {name} is not there, nor {name}.gz; put MNIST's four files there, or fetch them "
                f"with data.download=true (in Python download=True, then prepare_data())"
            )
        try:
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is damaged ({error}): get it again") from None
        start = 4 + 4 * dimensions
        shape = [int(size) for size in np.frombuffer(content[4:start], ">u4")]
        if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) - start != np.prod(shape):
            raise ValueError(f"{path} is damaged: it does not hold what its first bytes say; get it again")
        return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())
