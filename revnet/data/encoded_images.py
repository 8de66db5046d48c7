"""What the data modules of encoded images have in common: images of any size are brought to one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from revnet.data.module import ImageDataModule
from revnet.data.normalize import IMAGENET_MEAN

__all__ = ["EncodedImages"]

Transform = Callable[[Image.Image], Tensor]


class EncodedImages(ImageDataModule):
    """Images of any size and mode, brought to a square of one size; a subclass says where they are stored.

    Args:
        classes: how many the data has.
        image_size: side of the square that images are brought to, in pixels.
        crop_ratio: the central square that is scaled to `image_size`, as a share of an image's shorter side.
        crop_area: smallest and largest share of an image's area that a training crop takes, at any place and of an
            aspect between 3:4 and 4:3 (the Inception networks' way). None: training takes the central square too,
            shifted by up to `padding`.
        color_jitter: strength of random changes of training images in brightness, contrast, saturation and hue, see
            torchvision's `ColorJitter`; None for none.
        trivial_augment: one random change of random strength for every training image, see torchvision's
            `TrivialAugmentWide`.
        random_erasing: share of the training images in which a rectangle is filled with ImageNet's mean, see
            torchvision's `RandomErasing`.
        padding: see `ImageDataModule`.
        options: its other arguments.
    """

    def __init__(
        self,
        classes: int,
        image_size: int = 32,
        *,
        crop_ratio: float = 1.0,
        crop_area: Sequence[float] | None = None,
        color_jitter: Sequence[float] | None = None,
        trivial_augment: bool = False,
        random_erasing: float = 0.0,
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
        if not 0 <= random_erasing <= 1:
            raise ValueError(f"random_erasing={random_erasing}: give a share from 0 to 1")
        super().__init__((3, image_size, image_size), classes, padding=padding, **options)
        self.crop_ratio = crop_ratio
        self.crop_area = crop_area
        self.color_jitter = color_jitter
        self.trivial_augment = trivial_augment
        self.random_erasing = random_erasing

    @property
    def varies(self) -> bool:
        """Whether training sees an image in another way each time it is read."""
        return bool(self.crop_area or self.color_jitter or self.trivial_augment or self.random_erasing)

    def plain(self) -> Transform:
        """Return what makes a tensor of bytes of an image, always the same."""
        return partial(central_square, size=self.image_shape[1], ratio=self.crop_ratio)

    def varied(self) -> Transform:
        """Return what training makes of an image, by torch's random numbers."""
        if not self.varies:
            return self.plain()
        steps: list[Callable] = []
        if self.crop_area is not None:
            low, high = self.crop_area
            steps += [v2.RandomResizedCrop(self.image_shape[1:], scale=(low, high)), v2.PILToTensor()]
        else:
            steps.append(self.plain())
        if self.color_jitter is not None:
            steps.append(v2.ColorJitter(*self.color_jitter))
        if self.trivial_augment:
            steps.append(v2.TrivialAugmentWide())
        if self.random_erasing:
            mean = [round(255 * value) for value in IMAGENET_MEAN]
            steps.append(v2.RandomErasing(self.random_erasing, value=mean))
        return v2.Compose(steps)


def central_square(image: Image.Image, size: int, ratio: float) -> Tensor:
    """Cut the central square of `ratio` times an image's shorter side, and scale it to `size` pixels a side."""
    square = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR, bleed=(1 - ratio) / 2)
    return v2.functional.pil_to_tensor(square)
