"""What lies in a directory that has one folder of images for each class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

__all__ = ["class_names", "few", "list_images"]

SUFFIXES = (*IMG_EXTENSIONS, ".gif")


def class_names(directory: Path) -> list[str]:
    """The folders in `directory`, sorted; hidden ones are no classes.

    Raises:
        FileNotFoundError: if there is no such directory, or it has no folders.
    """
    remedy = f"put images into {directory}/CLASS/, or set root to where they are"
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory; {remedy}")
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if not names:
        raise FileNotFoundError(f"{directory} has no class folders; {remedy}")
    return names


def list_images(directory: Path, names: Sequence[str]) -> tuple[list[str], Tensor]:
    """The image files in the class folders of `directory` and below them, sorted within a class, and their labels.

    Files with a suffix that no image has, hidden files and hidden folders are passed over.

    Args:
        directory: with the class folders.
        names: those that have to be there; a label is the place in it.

    Raises:
        FileNotFoundError: as `class_names`.
        ValueError: if the class folders are others than `names`, or one has no images.
    """
    found = class_names(directory)
    lacking, unknown = sorted(set(names) - set(found)), sorted(set(found) - set(names))
    if lacking or unknown:
        raise ValueError(
            f"{directory} has other classes than the training images: {few(lacking)} lacking, {few(unknown)} "
            f"unknown; give both the same class folders"
        )
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        files = sorted(
            os.path.join(folder, file)
            for folder, contents in _walk(directory / name)
            for file in contents
            if file.lower().endswith(SUFFIXES) and file[0] != "."
        )
        if not files:
            raise ValueError(f"{directory / name} has no images ({' '.join(SUFFIXES)}); add some or remove it")
        paths += files
        labels += [label] * len(files)
    return paths, torch.tensor(labels)


def _walk(directory: Path) -> Iterator[tuple[str, list[str]]]:
    """The folders from this one down with their files, but for hidden ones (thumbnails, say)."""
    for folder, below, files in os.walk(directory, followlinks=True):
        below[:] = [name for name in below if name[0] != "."]
        yield folder, files


def few(names: Sequence[str]) -> str:
    """Some of the names, and how many more there are."""
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"
