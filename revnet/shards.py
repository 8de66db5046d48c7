"""The command `revnet-shards`: write a folder of images into tar files."""

from __future__ import annotations

from hydra.utils import instantiate
from omegaconf import DictConfig

from revnet.cli import command

__all__ = ["main"]


@command("shards")
def main(cfg: DictConfig) -> None:
    """Convert as the command line says, and say what there is."""
    index = instantiate(cfg)
    for split, shards in index.splits.items():
        left_out = sum(len(shard.unreadable) for shard in shards)
        images = f"{sum(shard.count for shard in shards):,} images of {len(index.classes):,} classes"
        print(f"{split}: {images} in {len(shards):,} shards" + (f", {left_out:,} unreadable left out" * bool(left_out)))


if __name__ == "__main__":
    main()
