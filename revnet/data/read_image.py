"""Image files of any mode to RGB."""

from __future__ import annotations

import io
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

__all__ = ["read_image"]


def read_image(file: str | PathLike[str] | BinaryIO, name: str | None = None) -> Image.Image:
    """Read an image file as 8-bit RGB.

    Grayscale is repeated, CMYK converted, 16-bit grayscale scaled down, transparency dropped; of an animation the
    first picture is taken.

    Args:
        file: path or content of a file of any format that Pillow reads.
        name: what an error calls it; None: its path.

    Raises:
        OSError: if the file cannot be had, which does not say that the image is bad.
        ValueError: if it is damaged, cut short, not an image, or has pixels without a defined range (32-bit, float).
            The message begins with the name.

    Example:
        >>> import os, tempfile
        >>> from PIL import Image
        >>> from revnet.data import read_image
        >>> file = os.path.join(tempfile.mkdtemp(), "gray.png")
        >>> Image.new("L", (4, 2)).save(file)
        >>> read_image(file).mode, read_image(file).size
        ('RGB', (4, 2))
    """
    content = io.BytesIO(_bytes(Path(file))) if isinstance(file, str | PathLike) else file
    try:
        with Image.open(content) as image:
            return _rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever their parsers run into
        raise ValueError(f"{name or file}: not a readable image ({error})") from None


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None  # it names the file only if it was not opened


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("pixels of more than 16 bits: save it with 8 or 16")
        image = Image.fromarray(((pixels.astype(np.int64) + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("pixels are floating-point numbers: save it with 8 or 16 bits")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of the direct way
    return image.convert("RGB")
