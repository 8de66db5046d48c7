"""A folder of images to shards: tar files to be streamed from slow or distant disks."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from revnet.data.class_folders import class_names, few, list_images
from revnet.data.datasets import whole_batch
from revnet.data.image_folder import held_out_splits
from revnet.data.module import processors
from revnet.data.read_image import read_image
from revnet.data.shard_index import Shard, ShardIndex, need_webdataset

__all__ = ["write_shards"]

RECORD = "finished.jsonl"  # a line for the conversion, then one for each finished shard


def write_shards(
    root: str | PathLike[str],
    out: str | PathLike[str],
    shard_size: int = 1000,
    seed: int = 0,
    num_workers: int | None = None,
    skip_unreadable: bool = False,
) -> ShardIndex:
    """Write `out/train-000000.tar`, ... and `out/index.json`.

    The files of images go into the shards as they are, in random order, and every one is decoded once to see whether it
    can be. A shard has its name only when it is finished: a conversion that was interrupted and is started again goes
    on where it stopped, and ends in the same bytes.

    Args:
        root: folder of images, see `ImageFolder`.
        out: directory of the shards; made if it is not there.
        shard_size: images in a shard.
        seed: of their order.
        num_workers: processes to share the work; None for one for each processor.
        skip_unreadable: leave out files that are no images. Else there is no index with them, and an error at the end.

    Returns:
        What the index says.

    Raises:
        FileNotFoundError: as `ImageFolder`.
        ValueError: if images cannot be read, or `out` holds shards of something else.
        OSError: if the disk is full or a file cannot be read; started again, it goes on.
        ImportError: if webdataset is not installed.
    """
    need_webdataset()
    source, target = Path(root).expanduser(), Path(out).expanduser()
    if not isinstance(shard_size, int) or shard_size < 1:
        raise ValueError(f"shard_size={shard_size}: give a whole number of images, at least 1")
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: give a whole number from 0 to 2**32 - 1")
    if num_workers is not None and (not isinstance(num_workers, int) or num_workers < 0):
        raise ValueError(f"num_workers={num_workers}: give a whole number of processes, 0 for none")
    classes = class_names(source / "train")
    planned: dict[str, PlannedShard] = {}
    for split in ("train", *held_out_splits(source)):
        paths, labels = list_images(source / split, classes)
        order = np.random.RandomState(seed).permutation(len(paths))  # its numbers never change
        for number, chosen in enumerate(np.split(order, range(shard_size, len(order), shard_size))):
            file = f"{split}-{number:06d}.tar"
            images = [(os.path.relpath(paths[index], source), int(labels[index])) for index in chosen]
            planned[file] = PlannedShard(source, target / file, images)
    contents = hashlib.sha256(repr([(file, shard.images) for file, shard in planned.items()]).encode())
    conversion = {"root": str(source.resolve()), "shard_size": shard_size, "seed": seed, "files": contents.hexdigest()}

    target.mkdir(parents=True, exist_ok=True)
    record_is_there = (target / RECORD).is_file()
    strangers = [] if record_is_there else [file for file in ("index.json", *planned) if (target / file).exists()]
    if strangers:
        raise ValueError(
            f"out={target} holds {strangers[0]}, but no record of a conversion ({RECORD}): choose another out"
        )
    finished = {shard.file: shard for shard in _read_record(target, conversion) if not shard.missing(target)}
    _write_record(target, conversion, finished.values())
    left = [shard for file, shard in planned.items() if file not in finished]
    workers = min(processors() if num_workers is None else num_workers, len(left))
    loader = DataLoader(
        _Writing(left), batch_size=None, num_workers=workers, collate_fn=whole_batch, in_order=workers == 0
    )
    with _naming(target / RECORD), (target / RECORD).open("a") as record:
        for shard in track(loader, f"Writing {len(left):,} of {len(planned):,} shards", disable=not left):
            record.write(json.dumps(vars(shard)) + "\n")
            record.flush()
            finished[shard.file] = shard
    _write_record(target, conversion, [finished[file] for file in planned])  # in their order
    unreadable = [path for file in planned for path in finished[file].unreadable]
    if unreadable and not skip_unreadable:
        raise ValueError(
            f"{len(unreadable)} images in {source} cannot be read: {few(unreadable)} "
            f"({target / RECORD} names all): replace them and choose another out, or give skip_unreadable=true"
        )
    splits: dict[str, list[Shard]] = {}
    for file in planned:
        splits.setdefault(file.partition("-")[0], []).append(finished[file])
    index = ShardIndex(classes, splits)
    with _naming(target):
        index.write(target)
    return index


class PlannedShard:
    """A shard and what goes into it.

    Args:
        source: directory that the images' paths start from.
        file: to be written.
        images: path and label of each.
    """

    def __init__(self, source: Path, file: Path, images: list[tuple[str, int]]) -> None:
        self.source = source
        self.file = file
        self.images = images

    def write(self) -> Shard:
        """Write the file, under another name until it is finished."""
        from webdataset import TarWriter

        part = self.file.with_suffix(".part")
        unreadable = []
        with _naming(part), part.open("wb") as stream:
            with TarWriter(stream, encoder=False, mtime=0) as tar:
                for number, (path, label) in enumerate(self.images):
                    with _naming(self.source / path):
                        content, suffix = (self.source / path).read_bytes(), Path(path).suffix[1:].lower()
                    if _is_image(content):
                        tar.write({"__key__": f"{number:06d}", suffix: content, "cls": str(label).encode()})
                    else:
                        unreadable.append(path)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(self.file)
        count = len(self.images) - len(unreadable)
        return Shard(self.file.name, count, self.file.stat().st_size, unreadable)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Let an error of reading or writing, as on a full disk, name the file, as that of opening one does."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error


def _is_image(content: bytes) -> bool:
    try:
        read_image(io.BytesIO(content))
    except ValueError:
        return False
    return True


class _Writing(Dataset[Shard]):
    """Shards that are written when they are asked for, so that the workers of a data loader write them."""

    def __init__(self, shards: list[PlannedShard]) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> Shard:
        return self.shards[index].write()


def _read_record(target: Path, conversion: dict[str, Any]) -> list[Shard]:
    """The shards that an earlier run of the same conversion has finished."""
    file = target / RECORD
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one is not if that run was killed
    if whole and whole[0] != conversion:
        raise ValueError(
            f"out={target} holds shards of other images, or made with another shard_size or seed ({file}): "
            "choose another out"
        )
    return [Shard.of(shard) for shard in whole[1:]]


def _write_record(target: Path, conversion: dict[str, Any], finished: Iterable[Shard]) -> None:
    part = target / f"{RECORD}.part"
    with _naming(part):
        part.write_text("".join(json.dumps(line) + "\n" for line in (conversion, *map(vars, finished))))
    part.replace(target / RECORD)
