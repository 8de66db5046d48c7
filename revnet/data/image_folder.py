"""Directories of images, one folder for each class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from revnet.data.class_folders import class_names, list_images
from revnet.data.datasets import FileImages, TensorImages
from revnet.data.module import ImageDataModule, Images

__all__ = ["ImageFolder"]


class ImageFolder(ImageDataModule):
    """Images of any size and mode in `root/train/CLASS/`, `root/test/CLASS/` and, if wanted, `root/val/CLASS/`.

    Of `val` and `test` one is enough: it is the test then, and the validation split is cut from `train`. Images that
    fit into `memory_limit` are read once and held as bytes. Others, and those of which training takes crops of its own
    or changes the colours, are read by `num_workers` processes whenever they are needed.

    Args:
        root: directory with these folders.
        image_size: side of the square that images are brought to, in pixels.
        crop_ratio: the central square that is scaled to `image_size`, as a share of an image's shorter side.
        crop_area: smallest and largest share of an image's area that a training crop takes, at any place and of an
            aspect between 3:4 and 4:3 (the Inception networks' way). None: training takes the central square too,
            shifted by up to `padding`.
        color_jitter: strength of random changes of training images in brightness, contrast, saturation and hue, see
            torchvision's `ColorJitter`; None for none.
        memory_limit: GiB that images may take in memory.
        padding: see `ImageDataModule`.
        options: its other arguments.

    Raises:
        FileNotFoundError: if a folder is missing or has no classes in it.
        ValueError: if a class has no images, or test and training images have different classes. Images that cannot be
            read raise one with their path, when they are read.
    """

    def __init__(
        self,
        root: str | PathLike[str],
        image_size: int = 32,
        *,
        crop_ratio: float = 1.0,
        crop_area: Sequence[float] | None = None,
        color_jitter: Sequence[float] | None = None,
        memory_limit: float = 2.0,
        padding: int = 4,
        **options: Any,
    ) -> None:
        if not isinstance(image_size, int) or image_size < 1:
            raise ValueError(f"image_size={image_size}: give a whole number of pixels, at least 1")
        if not 0 < crop_ratio <= 1:
            raise ValueError(f"crop_ratio={crop_ratio}: give a share of more than 0, at most 1")
        if crop_area is not None and (len(crop_area) != 2 or not 0 < crop_area[0] <= crop_area[1] <= 1):
            raise ValueError(f"crop_area={crop_area}: give a smallest and a largest share, such as [0.05, 1]")
        if crop_area is not None and padding:
            raise ValueError(f"crop_area={crop_area} and padding={padding} both crop: set one to null or 0")
        if color_jitter is not None and (len(color_jitter) != 4 or min(color_jitter) < 0 or color_jitter[3] > 0.5):
            raise ValueError(
                f"color_jitter={color_jitter}: give strengths of brightness, contrast, saturation and hue (at most "
                "0.5), such as [0.125, 0.5, 0.5, 0.2]"
            )
        if memory_limit < 0:
            raise ValueError(f"memory_limit={memory_limit}: give GiB, 0 to read images when they are needed")
        self.root = Path(root).expanduser()
        self.class_names = class_names(self.root / "train")
        super().__init__((3, image_size, image_size), len(self.class_names), padding=padding, **options)
        self.crop_ratio = crop_ratio
        self.crop_area = crop_area
        self.color_jitter = color_jitter
        self.memory_limit = memory_limit

    def load(self) -> tuple[Images, Images | None, Images]:
        """Find the files, and read them if they can be held."""
        held_out = [name for name in ("val", "test") if (self.root / name).is_dir()]
        if not held_out:
            raise FileNotFoundError(f"{self.root} has neither test/ nor val/; put images into {self.root}/test/CLASS/")
        size = self.image_shape[1]
        transform = partial(central_square, size=size, ratio=self.crop_ratio)
        files = [
            FileImages(*list_images(self.root / name, self.class_names), transform) for name in ("train", *held_out)
        ]
        read: list[Images] = [*files]
        gibibytes = sum(map(len, files)) * 3 * size**2 / 2**30
        if self.crop_area is None and self.color_jitter is None and gibibytes <= self.memory_limit:
            read = [split.decode(self.image_shape, self.workers(split)) for split in files]
        return read[0], read[1] if len(read) == 3 else None, read[-1]

    def vary(self, images: Images) -> Images:
        """Crop at random places and change the colours, where that is wanted."""
        if isinstance(images, TensorImages):
            return images
        steps: list[Callable] = [images.transform]
        if self.crop_area is not None:
            low, high = self.crop_area
            steps = [v2.RandomResizedCrop(self.image_shape[1:], scale=(low, high)), v2.PILToTensor()]
        if self.color_jitter is not None:
            steps.append(v2.ColorJitter(*self.color_jitter))
        return FileImages(images.paths, images.labels, v2.Compose(steps))


def central_square(image: Image.Image, size: int, ratio: float) -> Tensor:
    """Cut the central square of `ratio` times an image's shorter side, and scale it to `size` pixels a side."""
    square = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR, bleed=(1 - ratio) / 2)
    return v2.functional.pil_to_tensor(square)
