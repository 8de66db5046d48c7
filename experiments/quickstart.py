"""RevNet-38 against ResNet-32 on real digits, in one to two minutes on a CPU: accuracy, step time, memory.

Trains both with the same recipe (`experiment=digits_quickstart`, seed 0), then measures a training step of each at the
size of CIFAR (batch 100, 32x32) and on the digits themselves (8x8), and draws the memory of RevNets of growing depth
under store, recompute and reconstruct. Memory is the peak of activations and temporaries over the whole step, backward
pass included; parameters and their gradients are left out.

    python experiments/quickstart.py [--record]

Writes a table as JSON and a picture to runs/quickstart/TIME; with --record also to experiments/results.
"""

from __future__ import annotations

import argparse
import shutil
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from recording import ROOT, allocator_keeps_memory, hardware, record, result_path
from rich.console import Console
from rich.progress import track
from rich.table import Table

from revnet import set_activations
from revnet.cli import compose
from revnet.models import RevNet, get_model
from revnet.models.branches import BasicBranch
from revnet.models.paper import table_1
from revnet.profiling import measure_memory, measure_time
from revnet.train import train

matplotlib.use("agg")
import matplotlib.pyplot as plt

NETWORKS = ("resnet32", "revnet38")
VALUES = ("store", "recompute", "reconstruct")
SIZES = (8, 32)
BATCH = 100
UNITS = (1, 2, 3, 5, 7, 9)


def step_figures() -> dict[str, dict[str, float]]:
    """Median time of a training step, the networks taking turns, and its peak memory."""
    figures: dict[str, dict[str, float]] = {name: {} for name in NETWORKS}
    labels = torch.arange(BATCH) % 10

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels)

    networks = {name: get_model(name).to(memory_format=torch.channels_last) for name in NETWORKS}
    for size in SIZES:
        images = torch.randn(BATCH, 3, size, size).contiguous(memory_format=torch.channels_last)
        rounds = [{n: measure_time(m, images, loss, repeats=1).step for n, m in networks.items()} for _ in range(7)]
        for name, network in networks.items():
            figures[name][f"step_seconds_{size}"] = median(turn[name] for turn in rounds)
            figures[name][f"peak_bytes_{size}"] = measure_memory(network, images, loss).peak
    return figures


def depth_figures() -> list[dict[str, Any]]:
    """Peak memory of RevNets with 1 to 9 units a stage, for each way to treat activations."""
    rows = []
    images = torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    for units in track(UNITS, "memory against depth"):
        network = RevNet(*table_1(BasicBranch, (units,) * 3, (32, 32, 64, 112)), small_images=True, num_classes=10)
        network.to(memory_format=torch.channels_last)
        for value in VALUES:
            set_activations(network, value)
            rows.append(
                {"layers": 12 * units + 2, "activations": value, "peak_bytes": measure_memory(network, images).peak}
            )
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for value in VALUES:
        points = [(row["layers"], row["peak_bytes"] / 1e6) for row in rows if row["activations"] == value]
        axis.plot(*zip(*points, strict=True), marker="o", label=value)
        axis.annotate(f"{points[-1][1]:.0f} MB", points[-1], (8, -3), textcoords="offset points")
    axis.set(
        title=f"RevNets on 32x32 images, batch {BATCH}, fp32",
        xlabel="layers with weights",
        ylabel="peak of activations and temporaries, MB",
        ylim=(0, None),
    )
    axis.set_xlim(right=axis.get_xlim()[1] * 1.1)
    axis.grid(alpha=0.3)
    axis.legend(title="activations")
    figure.savefig(path, dpi=150)


def show(rows: dict[str, dict[str, Any]]) -> None:
    table = Table("", *NETWORKS, "ratio", title="The same recipe on scikit-learn's digits")

    def add(label: str, key: str, form: str, scale: float = 1.0, ratio: bool = True) -> None:
        values = [row[key] for row in rows.values()]
        table.add_row(label, *(form.format(scale * v) for v in values), f"{values[1] / values[0]:.2f}" if ratio else "")

    add("parameters", "parameters", "{:,.0f}")
    add("test accuracy, %", "test_accuracy", "{:.2f}", 100, ratio=False)
    for size in SIZES:
        add(f"training step at {size}x{size}, ms", f"step_seconds_{size}", "{:.0f}", 1e3)
        add(f"peak activation memory at {size}x{size}, MB", f"peak_bytes_{size}", "{:.1f}", 1e-6)
    console = Console()
    console.print(table)
    console.print(
        f"Batch {BATCH}, fp32, {hardware()['device']}, {hardware()['threads']} threads, torch {torch.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="copy table and picture to experiments/results")
    options = parser.parse_args()
    allocator_keeps_memory()
    threads = torch.get_num_threads()
    directory = ROOT / "runs" / "quickstart" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    directory.mkdir(parents=True)
    rows: dict[str, dict[str, Any]] = {}
    for name in NETWORKS:
        cfg = compose("train", "experiment=digits_quickstart", f"model={name}", f"run_dir='{directory / name}'")
        accuracy = train(cfg)["test/accuracy"]
        parameters = sum(p.numel() for p in get_model(name).parameters())
        rows[name] = {"parameters": parameters, "test_accuracy": accuracy}
    torch.set_num_threads(threads)  # the recipe trains on one
    for name, figures in step_figures().items():
        rows[name] |= figures
    depths = depth_figures()
    record(directory / "quickstart", {"batch": BATCH}, [{"network": n, **row} for n, row in rows.items()] + depths)
    draw(depths, directory / "quickstart.png")
    show(rows)
    Console().print(f"Table and picture: {directory}/quickstart.json, quickstart.png", soft_wrap=True)
    if options.record:
        for ending in (".json", ".png"):
            shutil.copy(directory / f"quickstart{ending}", result_path("quickstart").with_suffix(ending))


if __name__ == "__main__":
    main()
