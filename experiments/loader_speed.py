"""Is loading images ever the bottleneck of a training?

Images per second of the loader alone (reading, batching, moving to the device, normalising and augmenting there)
against those of a training step alone (forward and backward; the optimizer would make it slower), in two cases:

- in memory: 32x32 images held as bytes, shifted by up to 4 pixels and mirrored, for networks of CIFAR;
- from files: JPEGs of 500x375 made here, random crops of 224x224 taken by worker processes, for networks of ImageNet.

On a CPU both compete for the same cores: a loader of n times the step's rate costs 1/n of the step's time on top.

    python experiments/loader_speed.py [--device cpu] [--dtype float32|bfloat16] [--files 2000] [--repeats 3]

Writes a table as JSON and a picture to experiments/results/loader_speed_HARDWARE_DATE.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from recording import allocator_keeps_memory, hardware, record, result_path
from rich.console import Console
from rich.progress import track
from rich.table import Table

from revnet.data import Fake, ImageDataModule, ImageFolder
from revnet.models import get_model
from revnet.profiling import measure_time

matplotlib.use("agg")
import matplotlib.pyplot as plt


def write_photographs(root: Path, count: int) -> None:
    """Writes JPEGs with about as much detail as photographs have; all are in one class."""
    random = np.random.default_rng(0)
    for split, images in (("train", count), ("test", 1)):
        (root / split / "photograph").mkdir(parents=True)
        for index in track(range(images), f"writing {split} images"):
            coarse = Image.fromarray(random.integers(256, size=(47, 63, 3), dtype=np.uint8))
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(root / split / "photograph" / f"{index}.jpg")


def loader_speed(data: ImageDataModule, device: str, repeats: int) -> float:
    """Images per second of whole epochs; the first, which starts the workers, does not count."""
    data.setup()
    loader = data.train_dataloader()
    for epoch in range(1 + repeats):
        if epoch == 1:
            start = time.perf_counter()
        for images, labels in loader:
            data.preprocess(images.to(device), training=True)
            labels.to(device)
    if device != "cpu":
        torch.cuda.synchronize()
    return repeats * len(loader) * data.batch_size / (time.perf_counter() - start)


def step_speed(network: str, data: ImageDataModule, options: argparse.Namespace) -> float:
    module = get_model(network).to(options.device).to(memory_format=torch.channels_last)
    images = torch.randn(data.batch_size, *data.image_shape, device=options.device)
    images = images.contiguous(memory_format=torch.channels_last)
    autocast = None if options.dtype == "float32" else torch.bfloat16
    return data.batch_size / measure_time(module, images, dtype=autocast, repeats=options.repeats).step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of autocast")
    parser.add_argument("--files", type=int, default=2000, help="how many JPEGs to make")
    parser.add_argument("--repeats", type=int, default=3, help="epochs and steps to measure")
    options = parser.parse_args()
    allocator_keeps_memory()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        write_photographs(Path(root), options.files)
        files = ImageFolder(root, 224, crop_area=(0.05, 1), padding=0, batch_size=32, val_fraction=0)
        memory = Fake(train_size=20_000, padding=4, flip=True, val_fraction=0, batch_size=128)
        cases: dict[str, tuple[ImageDataModule, tuple[str, ...]]] = {
            "in memory, 32x32": (memory, ("resnet32", "revnet38")),
            "JPEG files, 224x224": (files, ("preact_resnet50", "revnet56")),
        }
        for case, (data, networks) in cases.items():
            loader = loader_speed(data, options.device, options.repeats)
            for network in networks:
                step = step_speed(network, data, options)
                row = {"case": case, "workers": data.num_workers, "batch": data.batch_size, "network": network}
                rows.append({**row, "loader_images_per_second": loader, "step_images_per_second": step})
    path = result_path("loader_speed", options.device)
    record(path, vars(options), rows, options.device)
    title = f"Images per second on {hardware(options.device)['device']}, {options.dtype}"
    show(rows, title)
    draw(rows, title, path)
    Console().print(f"Written to {path}.json and {path}.png")


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table("images", "workers", "network", "loader", "step", "loader over step", title=title)
    for row in rows:
        loader, step = row["loader_images_per_second"], row["step_images_per_second"]
        figures = (f"{loader:,.0f}", f"{step:,.1f}", f"{loader / step:,.1f}")
        table.add_row(row["case"], str(row["workers"]), row["network"], *figures)
    Console().print(table)


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for offset, what in ((-0.2, "loader"), (0.2, "step")):
        rates = [row[f"{what}_images_per_second"] for row in rows]
        axis.bar_label(axis.bar(np.arange(len(rows)) + offset, rates, 0.38, label=f"{what} alone"), fmt="{:,.0f}")
    axis.set_xticks(range(len(rows)), [f"{row['network']}\n{row['case']}" for row in rows], fontsize=8)
    axis.set(yscale="log", ylabel="images per second", title=title)
    axis.margins(y=0.1)
    axis.legend()
    figure.savefig(path.with_suffix(".png"), dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
