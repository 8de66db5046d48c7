"""ResNet-32 against RevNet-38 on CIFAR-10 as a folder of images: accuracy, seconds per epoch, peak memory.

The same short recipe for both: bf16 autocast, channels_last, one cycle of SGD, batch 128, and the best epoch on a fixed
tenth of the training images is tested. What is in ROOT/train and ROOT/test decides what the figures mean: NAME says it.

    python experiments/cifar10_folder.py ROOT [--name "CIFAR-10 (JPEG q75)"] [--epochs 4] [--seeds 0]

Each run is written as it ends to experiments/results/cifar10_folder_HARDWARE_DATE.json, with its whole configuration; a
run that is there already is not repeated. The picture beside it shows the curves.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from recording import ROOT, allocator_keeps_memory, record, result_path
from rich.console import Console
from rich.table import Table

from revnet.cli import compose
from revnet.models import get_model
from revnet.profiling import measure_memory
from revnet.train import train

matplotlib.use("agg")
import matplotlib.pyplot as plt

NETWORKS = ("resnet32", "revnet38")


def run(network: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Trains, tests and measures one network."""
    directory = ROOT / "runs" / "cifar10_folder" / f"{network}_{seed}_{options.epochs}"
    cfg = compose(
        "train",
        "experiment=cifar10_fast",
        f"model={network}",
        "data=image_folder",
        f"data.root={Path(options.root).resolve()}",
        "data.batch_size=128",
        "optimizer.lr=0.1",
        "trainer=cpu",
        "trainer.precision=bf16-mixed",
        f"trainer.max_epochs={options.epochs}",
        f"seed={seed}",
        f"run_dir={directory}",
    )
    metrics = train(cfg)
    images = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    module = get_model(network).to(memory_format=torch.channels_last)
    labels = torch.zeros(128, dtype=torch.long)
    memory = measure_memory(module, images, lambda y: F.cross_entropy(y.float(), labels), torch.bfloat16)
    cfg.data.root, cfg.run_dir = "ROOT", str(directory.relative_to(ROOT))
    return {
        "network": network,
        "seed": seed,
        "epochs": options.epochs,
        "test_accuracy": metrics["test/accuracy"],
        "seconds_per_epoch": metrics["seconds_per_epoch"],
        "images_per_second": metrics["images_per_second"],
        "peak_bytes_of_process": metrics["peak_memory_mib"] * 2**20,
        "peak_bytes_of_activations": memory.peak,
        "curve": curve(directory),
        "configuration": OmegaConf.to_container(cfg, resolve=True),
    }


def curve(directory: Path) -> list[dict[str, float]]:
    """Validation accuracy after each epoch, from the run's CSV log."""
    with sorted(directory.glob("csv/*/metrics.csv"))[-1].open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/accuracy")]
    return [{"step": float(row["step"]), "val_accuracy": float(row["val/accuracy"])} for row in rows]


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for number, name in enumerate(NETWORKS):
        for row in (row for row in rows if row["network"] == name):
            values = [100 * point["val_accuracy"] for point in row["curve"]]
            axis.plot(
                range(1, len(values) + 1), values, marker="o", color=f"C{number}", label=f"{name}, seed {row['seed']}"
            )
    axis.set(title=title, xlabel="epoch", ylabel="accuracy on the validation tenth, %")
    axis.locator_params(axis="x", integer=True)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path.with_suffix(".png"), dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder with train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument("--name", default="CIFAR-10", help="what the images are, for the record")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    allocator_keeps_memory()
    path = result_path("cifar10_folder")
    file = path.with_suffix(".json")
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    for seed in options.seeds:
        for network in NETWORKS:
            key = (network, seed, options.epochs)
            if key not in [(row["network"], row["seed"], row["epochs"]) for row in rows]:
                rows.append(run(*key[:2], options))
            record(path, {"data": options.name, "epochs": options.epochs}, rows)
            draw(rows, f"{options.name}, {options.epochs} epochs, bf16", path)
    table = Table("", "seed", "test accuracy, %", "s per epoch", "activations, MB", "process, MB", title=options.name)
    for row in rows:
        table.add_row(
            row["network"],
            str(row["seed"]),
            f"{100 * row['test_accuracy']:.2f}",
            f"{row['seconds_per_epoch']:.0f}",
            f"{row['peak_bytes_of_activations'] / 1e6:.1f}",
            f"{row['peak_bytes_of_process'] / 1e6:.0f}",
        )
    Console().print(table)
    Console().print(f"Written to {file} and {path}.png", soft_wrap=True)


if __name__ == "__main__":
    main()
