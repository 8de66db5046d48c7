"""RevNets against their ResNet twins on CIFAR-10: test error, time to accuracy, peak memory.

The same recipe for all: bf16 autocast, channels_last, batch 128, shifts, mirror images, cutout, label smoothing, one
cycle of SGD with Nesterov momentum, or with --recipe muon of Muon, with averaged weights (needs timm); muon_mixup is
the same with more regularisation, muon_light with that but for its weight decay, which is muon's. The epoch that is
best on a fixed part of the training images (a tenth, under muon_mixup and muon_light 4 %) is tested, once as it is and
once with the logits of every image and its mirror image averaged.
Activations are stored where the network is no RevNet, reconstructed where it is: "revnet38" in floating point,
"revnet38 exact" on the grid; "revnet38 exact stored" stores them and comes to the same bits in less
time. In ROOT lies torchvision's CIFAR-10, or with --data image_folder a folder of images; what is in ROOT/train and
ROOT/test then decides what the figures mean, and NAME says it.

    python experiments/cifar10_accuracy.py ROOT [--data cifar10] [--name CIFAR-10] [--recipe sgd] [--epochs 30]
        [--seeds 0 1 2] [--networks resnet32 revnet38 "revnet38 exact"] [--device cpu] [--threads 1]

Each run is written as it ends to experiments/results/cifar10_HARDWARE_DATE.json, with its whole configuration and the
command, commit and date of its every start; one that is there already is not repeated, one that was stopped goes on.
The picture beside it shows the curves.

Small networks use one core better than two: started twice side by side, each on other networks or seeds and with
--threads 1, it trains more in the same time. Such runs count for the errors; times are told by those without --threads.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from recording import ROOT, allocator_keeps_memory, record, resumed
from rich.console import Console
from rich.table import Table
from scipy import stats

from revnet.build import build
from revnet.cli import compose
from revnet.models import get_model
from revnet.profiling import measure_memory
from revnet.train import train
from revnet.training import load_checkpoint, read_checkpoint

matplotlib.use("agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet32": ("resnet32", {}),
    "revnet38": ("revnet38", {"exact": False}),
    "revnet38 exact": ("revnet38", {"exact": True}),
    "revnet38 exact stored": ("revnet38", {"exact": True, "activations": "store"}),
    "resnet110": ("resnet110", {}),
    "revnet110": ("revnet110", {"exact": False}),
    "revnet110 exact": ("revnet110", {"exact": True}),
    "revnet110 exact stored": ("revnet110", {"exact": True, "activations": "store"}),
}
TWINS = {"revnet38": "resnet32", "revnet110": "resnet110"}
RECIPES = {
    "sgd": ("cifar10_fast", ("data.batch_size=128", "optimizer.lr=0.1")),
    "muon": ("cifar10_muon", ()),
    "muon_mixup": ("cifar10_muon_mixup", ()),
    "muon_light": ("cifar10_muon_mixup", ("optimizer.weight_decay=0.02",)),
}


def run(network: str, seed: int, options: argparse.Namespace) -> Row:
    """Trains, tests and measures one network."""
    all_threads = torch.get_num_threads()
    name, arguments = NETWORKS[network]
    data = re.sub(r"[^a-z0-9]+", "-", options.name.lower()).strip("-")
    experiment, changes = RECIPES[options.recipe]
    directory = ROOT / "runs" / data / f"{network.replace(' ', '_')}_{seed}_{options.epochs}_{options.device}"
    if options.recipe != "sgd":
        directory = directory.with_name(f"{directory.name}_{options.recipe}")
    cfg = compose(
        "train",
        f"experiment={experiment}",
        *changes,
        f"model={name}",
        *(f"model.{key}={value}" for key, value in arguments.items()),
        f"data={options.data}",
        f"data.root='{Path(options.root).resolve()}'",
        f"trainer={'cpu' if options.device == 'cpu' else 'gpu'}",
        "trainer.precision=bf16-mixed",
        f"trainer.max_epochs={options.epochs}",
        f"seed={seed}",
        f"threads={options.threads or 'null'}",
        f"run_dir='{directory}'",
        "ckpt_path=last",
    )
    metrics = train(cfg)
    flipped = test_accuracy_with_flip(cfg, directory / "checkpoints" / "best.ckpt")
    images = torch.randn(128, 3, 32, 32, device=options.device).contiguous(memory_format=torch.channels_last)
    module = get_model(name, **arguments).to(options.device).to(memory_format=torch.channels_last)
    labels = torch.zeros(128, dtype=torch.long, device=options.device)
    memory = measure_memory(module, images, lambda y: F.cross_entropy(y.float(), labels), dtype=torch.bfloat16)
    rate = median(values(directory, "images_per_second"))
    configuration = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(configuration, dict)
    torch.set_num_threads(all_threads)
    configuration["data"]["root"], configuration["run_dir"] = "ROOT", str(directory.relative_to(ROOT))
    return {
        "network": network,
        "seed": seed,
        "epochs": options.epochs,
        "test_accuracy": metrics["test/accuracy"],
        "test_accuracy_with_flip": flipped,
        "images_per_second": rate,
        "seconds_per_epoch": train_images(cfg) / rate,
        "peak_bytes_of_activations": memory.peak,
        "train_accuracy": values(directory, "train/accuracy"),
        "val_accuracy": values(directory, "val/accuracy"),
        "starts": starts(directory),
        "configuration": configuration,
    }


def test_accuracy_with_flip(cfg: DictConfig, checkpoint: Path) -> float:
    cfg = cfg.copy()
    cfg.task.test_time_flip = True
    data, task = build(cfg)
    load_checkpoint(task, read_checkpoint(str(checkpoint)), str(checkpoint))
    trainer = instantiate(cfg.trainer, _convert_="all", logger=False, enable_checkpointing=False)
    (metrics,) = trainer.test(task, datamodule=data, verbose=False)
    return float(metrics["test/accuracy"])


def train_images(cfg: DictConfig) -> int:
    data = instantiate(cfg.data, _convert_="all")
    data.setup()
    return len(data.splits["train"])


def values(directory: Path, column: str) -> list[float]:
    """A column of the run's log; the log of a run that went on has the lines of before as well."""
    newest = max((directory / "csv").iterdir(), key=lambda version: int(version.name.partition("_")[2]))
    with (newest / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


def starts(directory: Path) -> list[dict[str, Any]]:
    """Date, command, commit and threads with which the run was begun, and gone on with.

    Runs of before 2026-11-29 have told of their beginning alone.
    """
    records = sorted(directory.glob("environment*.json"), key=lambda record: record.stat().st_mtime)
    found = [json.loads(record.read_text()) for record in records]
    return [{key: start.get(key) for key in ("date", "command", "commit", "threads")} for start in found]


def error(row: Row) -> float:
    """Test error in percent."""
    return 100 * (1 - row["test_accuracy"])


def kind(row: Row) -> tuple[str, str, int]:
    """Network, recipe and epochs: what runs of several seeds have in common."""
    directory = row["configuration"]["run_dir"]
    recipe = next((name for name in RECIPES if directory.endswith(f"_{name}")), "sgd")
    return row["network"], recipe, row["epochs"]


def difference(rows: Iterable[Row], own_kind: tuple[str, str, int]) -> tuple[float, tuple[float, float] | None] | None:
    """Mean test error of a RevNet less that of its twin, in points, and the 95 % interval (Welch)."""
    network, *training = own_kind
    twin_kind = (TWINS.get(network.split()[0]), *training)
    own, twin = ([error(row) for row in rows if kind(row) == wanted] for wanted in (own_kind, twin_kind))
    if not own or not twin:
        return None
    if min(len(own), len(twin)) < 2:
        return mean(own) - mean(twin), None
    interval = stats.ttest_ind(own, twin, equal_var=False).confidence_interval(0.95)
    return mean(own) - mean(twin), (interval.low, interval.high)


def draw(rows: list[Row], title: str, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    kinds = list(dict.fromkeys(map(kind, rows)))
    for row in rows:
        curve = [100 * value for value in row["val_accuracy"]]
        epochs = range(1, len(curve) + 1)
        color = f"C{kinds.index(kind(row))}"
        first = next(other for other in rows if kind(other) == kind(row))
        label = "{}, {}, {} epochs".format(*kind(row)) if row is first else None
        axes[0].plot(epochs, curve, color=color, linewidth=1, label=label)
        if timed(row):
            axes[1].plot([row["seconds_per_epoch"] / 60 * epoch for epoch in epochs], curve, color=color, linewidth=1)
    axes[0].set(xlabel="epoch", ylabel="accuracy on the validation images, %")
    axes[1].set(xlabel="minutes of training")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].locator_params(axis="x", integer=True)
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    plt.close(figure)


def show(rows: list[Row], title: str) -> None:
    columns = ("recipe", "epochs", "seeds", "test error, %", "less twin's, points", "with flip, %")
    table = Table("", *columns, "s per epoch", "minutes to 90 %", "activations, MB", title=title)
    for network, recipe, epochs in dict.fromkeys(map(kind, rows)):
        own = [row for row in rows if kind(row) == (network, recipe, epochs)]
        found = difference(rows, (network, recipe, epochs))
        less = "" if found is None else f"{found[0]:+.2f}"
        if found is not None and found[1] is not None:
            less += f" ({found[1][0]:+.2f} to {found[1][1]:+.2f})"
        alone = [row for row in own if timed(row)]
        reached = [minutes for row in alone if (minutes := minutes_to(row, 0.9)) is not None]
        table.add_row(
            network,
            recipe,
            str(epochs),
            " ".join(str(row["seed"]) for row in own),
            f"{mean(map(error, own)):.2f}  ({', '.join(f'{error(row):.2f}' for row in own)})",
            less,
            f"{mean(100 * (1 - row['test_accuracy_with_flip']) for row in own):.2f}",
            f"{mean(row['seconds_per_epoch'] for row in alone):.0f}" if alone else "",
            "" if not alone else f"{mean(reached):.0f}" if len(reached) == len(alone) else "not reached",
            f"{own[0]['peak_bytes_of_activations'] / 1e6:.1f}",
        )
    Console(width=150).print(table)


def timed(row: Row) -> bool:
    """Whether the run had all threads."""
    return row["configuration"]["threads"] is None


def minutes_to(row: Row, accuracy: float) -> float | None:
    """Of training, to this accuracy on the validation images."""
    epoch = next((number for number, value in enumerate(row["val_accuracy"], 1) if value >= accuracy), None)
    return None if epoch is None else epoch * row["seconds_per_epoch"] / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="of torchvision's CIFAR-10, or folder with train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument("--data", default="cifar10", choices=("cifar10", "image_folder"))
    parser.add_argument("--name", default="CIFAR-10", help="what the images are, for the record")
    parser.add_argument("--recipe", default="sgd", choices=RECIPES)
    parser.add_argument("--epochs", type=int, help="the recipe's own unless given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS)[:3])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="of torch; all unless given")
    options = parser.parse_args()
    if (options.data == "cifar10") != (options.name == parser.get_default("name")):
        parser.error("--data image_folder needs a --name of its own, and torchvision's CIFAR-10 has none")
    options.epochs = options.epochs or compose("train", f"experiment={RECIPES[options.recipe][0]}").trainer.max_epochs
    allocator_keeps_memory()
    sys.argv[sys.argv.index(options.root)] = "ROOT"  # in the record, which is of no one place
    settings = {"data": options.name}
    path, rows = resumed("cifar10", settings, options.device)
    for seed in options.seeds:
        for network in options.networks:
            key = (network, options.recipe, options.epochs), seed
            if key not in [(kind(row), row["seed"]) for row in rows]:
                row = run(network, seed, options)
                # Another process may have written its own meanwhile.
                rows = [*resumed("cifar10", settings, options.device, path)[1], row]
                record(path, settings, rows, options.device)
                draw(rows, f"{options.name}, bf16", path)
    show(rows, options.name)
    Console().print(f"Written to {path}.json and {path}.png", soft_wrap=True)


if __name__ == "__main__":
    main()
