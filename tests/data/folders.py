"""Folders of noise for the tests of shards."""

from pathlib import Path

from PIL import Image


def fill(root: Path, counts: dict[str, int]) -> Path:
    """In every split as many images as `counts` says, of two classes by turns; no two are alike."""
    for split, count in counts.items():
        for number in range(count):
            file = root / split / ("cat", "dog")[number % 2] / f"{number:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((12, 10), 80).save(file)
    return root
