import io
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from revnet.data import read_image

RED, GREEN = (255, 0, 0), (0, 255, 0)


def pixels(path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(
    ("mode", "color", "suffix", "expected"),
    [
        ("RGB", RED, "png", RED),
        ("L", 100, "jpg", (100, 100, 100)),
        ("LA", (100, 0), "png", (100, 100, 100)),
        ("RGBA", (*RED, 0), "png", RED),
        ("CMYK", (0, 255, 255, 0), "tif", RED),
        ("YCbCr", (76, 85, 255), "tif", (254, 0, 0)),
        ("1", 1, "png", (255, 255, 255)),
        ("I;16", 65535, "png", (255, 255, 255)),
        ("I;16", 32896, "png", (128, 128, 128)),
        ("I;16B", 257, "tif", (1, 1, 1)),
        ("I", 65535, "tif", (255, 255, 255)),
        ("RGB", GREEN, "webp", GREEN),
        ("RGB", GREEN, "gif", GREEN),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, color, suffix, expected):
    file = tmp_path / f"image.{suffix}"
    Image.new(mode, (3, 2), color).save(file, **({"lossless": True} if suffix == "webp" else {}))
    values = pixels(file)
    assert values.shape == (2, 3, 3)
    assert np.abs(values.astype(int) - expected).max() <= 1


def test_a_cmyk_jpeg_keeps_its_colour(tmp_path):
    Image.new("RGB", (8, 8), RED).convert("CMYK").save(tmp_path / "image.jpg", quality=100)
    assert np.abs(pixels(tmp_path / "image.jpg").astype(int) - RED).max() < 5


@pytest.mark.parametrize("transparency", [0, bytes([0, 128])])
def test_a_palette_with_transparency(tmp_path, transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "image.png", transparency=transparency)
    assert pixels(tmp_path / "image.png").tolist() == [[list(RED), list(GREEN)]]


def test_one_pixel(tmp_path):
    Image.new("L", (1, 1), 9).save(tmp_path / "image.png")
    assert pixels(tmp_path / "image.png").tolist() == [[[9, 9, 9]]]


def test_the_content_of_a_file_with_a_name(tmp_path):
    Image.new("L", (3, 2), 9).save(tmp_path / "image.png")
    content = (tmp_path / "image.png").read_bytes()
    assert pixels(io.BytesIO(content)).tolist() == [[[9, 9, 9]] * 3] * 2
    with pytest.raises(ValueError, match=r"^some\.tar: 7\.png: not a readable image"):
        read_image(io.BytesIO(content[:40]), "some.tar: 7.png")


def truncated(file):
    Image.effect_noise((64, 64), 100).save(file)
    file.write_bytes(file.read_bytes()[:-300])


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "bmp"])
def test_a_truncated_image_is_named(tmp_path, suffix):
    file = tmp_path / f"cut.{suffix}"
    truncated(file)
    with pytest.raises(ValueError, match=rf"^{file}: not a readable image \(.+\)$"):
        read_image(file)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_is_named(tmp_path, content):
    file = tmp_path / "image.jpg"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{file}: not a readable image") as caught:
        read_image(file)
    assert caught.value.__suppress_context__  # one line for the user


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), PermissionError(13, "Permission denied")])
def test_a_file_that_cannot_be_had_is_no_bad_image(tmp_path, error, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=error))
    with pytest.raises(OSError, match=f"{error.strerror}: '{tmp_path}/image.jpg'"):
        read_image(tmp_path / "image.jpg")


def test_pixels_without_a_defined_range_are_refused(tmp_path):
    Image.new("F", (2, 2), 0.5).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif: .*floating-point"):
        read_image(tmp_path / "float.tif")
    Image.new("I", (2, 2), 70000).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=r"deep\.tif: .*more than 16 bits"):
        read_image(tmp_path / "deep.tif")
