"""The file `index.json` of a directory of shards: what is in them, and how long each is."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Shard", "ShardIndex", "need_webdataset"]

INDEX = "index.json"
REMEDY = "run revnet-shards again: it writes what is not there"


@dataclass(frozen=True)
class Shard:
    """One tar file.

    Args:
        file: its name.
        count: images in it.
        bytes: its size.
        unreadable: paths of images, from the folder that was converted, that were left out.
    """

    file: str
    count: int
    bytes: int
    unreadable: Sequence[str] = field(default=())

    @classmethod
    def of(cls, record: dict[str, Any]) -> Shard:
        """One from its record, which may have more in it."""
        return cls(**{key: value for key, value in record.items() if key in cls.__dataclass_fields__})

    def missing(self, directory: Path) -> str | None:
        """What is wrong with the file, None if it is as long as it should be."""
        file = directory / self.file
        if not file.is_file():
            return f"{file} is missing"
        size = file.stat().st_size
        return None if size == self.bytes else f"{file} has {size:,} bytes instead of {self.bytes:,}"


@dataclass(frozen=True)
class ShardIndex:
    """The shards of every split.

    Args:
        classes: their names; a label is the place in it.
        splits: the shards of `train` and of `val`, `test` or both.
    """

    classes: list[str]
    splits: dict[str, list[Shard]]

    def write(self, directory: Path) -> None:
        """Write `index.json`, at once or not at all."""
        part = directory / f"{INDEX}.part"
        part.write_text(json.dumps(asdict(self), indent=1) + "\n")
        part.replace(directory / INDEX)

    @classmethod
    def read(cls, directory: Path) -> ShardIndex:
        """Read `index.json`.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if it is something else.
        """
        file = directory / INDEX
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; write it by revnet-shards root=FOLDER out={directory}")
        try:
            content: dict[str, Any] = json.loads(file.read_text())
            splits = {name: [Shard.of(shard) for shard in shards] for name, shards in content["splits"].items()}
            return cls(list(content["classes"]), splits)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is not an index of shards ({error}); {REMEDY}") from None

    def check(self, directory: Path) -> None:
        """Compare the size of every shard with the index.

        Raises:
            ValueError: if one is missing or cut short.
        """
        found = [shard.missing(directory) for shards in self.splits.values() for shard in shards]
        wrong = [line for line in found if line is not None]
        if wrong:
            more = f" and {len(wrong) - 1} more are damaged" if len(wrong) > 1 else ""
            raise ValueError(f"{wrong[0]}{more}; {REMEDY}")


def need_webdataset() -> None:
    """Refuse to go on without the package that reads and writes shards.

    Raises:
        ImportError: if it is not installed.
    """
    if importlib.util.find_spec("webdataset") is None:
        raise ImportError("shards are read and written by webdataset: pip install 'revnet[shards]'")
