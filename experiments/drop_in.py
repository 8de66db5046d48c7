"""What does a RevNet cost in the place of torchvision's ResNet of the same name, in memory and in time?

A training step (cross-entropy, no optimizer) of both networks in one run, batch 32, 224x224, channels_last, fp32 and
bf16 autocast; the RevNet under reconstruct, in floating point and exact. They have the same parameters and
multiply-adds within 3 %. The peak is that of activations and temporaries.

    python experiments/drop_in.py [--models revnet50 revnet101 revnet152] [--dtypes float32 bfloat16] [--repeats 5]

Every pair is written as it is measured to experiments/results/drop_in_HARDWARE_DATE.json (or --resume PATH), and not
measured again; the picture stands beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
import torchvision
from contest import take_turns
from recording import allocator_keeps_memory, hardware, record, resumed
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from revnet.models import get_model
from revnet.profiling import measure_memory

matplotlib.use("agg")
import matplotlib.pyplot as plt

TWIN, REVNET, EXACT = "store", "RevNet", "RevNet, exact"  # the contest's reference is called "store": the ResNet
TARGETS = {  # ResNet's peak over the RevNet's, at least
    ("revnet101", "float32"): 8,
    ("revnet152", "float32"): 10,
    ("revnet101", "bfloat16"): 5,
    ("revnet152", "bfloat16"): 6,
}
SLOWEST = 1.6  # times the ResNet's step


def resnet_name(name: str) -> str:
    return name.replace("revn", "resn")


def measure(name: str, dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contestant."""
    torch.manual_seed(0)
    size = (options.batch, 3, options.size, options.size)
    x = torch.randn(size, device=options.device).contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, 1000, (options.batch,), device=options.device)
    autocast = None if dtype == "float32" else torch.bfloat16
    contestants: dict[str, nn.Module] = {
        TWIN: torchvision.models.get_model(resnet_name(name)),
        REVNET: get_model(name, exact=False),
        EXACT: get_model(name, exact=True),
    }
    for network in contestants.values():
        network.to(options.device).to(memory_format=torch.channels_last)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, target)

    def prepare(contestant: str) -> Callable[[], None]:
        network = contestants[contestant]
        network.zero_grad()

        def step() -> None:
            with torch.autocast(options.device, torch.bfloat16, enabled=autocast is not None):
                value = loss(network(x))
            value.backward()

        return step

    peaks = {key: measure_memory(network, x, loss, dtype=autocast).peak for key, network in contestants.items()}
    rounds = range(options.repeats + options.warmup)
    figures = take_turns(list(contestants), prepare, rounds, options.warmup, options.device)
    return [
        {"model": name, "dtype": dtype, "contestant": key, **figures[key], "peak_bytes": peaks[key]}
        for key in contestants
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["revnet50", "revnet101", "revnet152"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", type=Path, metavar="PATH", help="the result to go on with, made if it is not there")
    options = parser.parse_args()
    allocator_keeps_memory()
    settings = {name: getattr(options, name) for name in ("batch", "size", "repeats", "warmup", "device")}
    path, rows = resumed("drop_in", settings, options.device, options.resume)
    pairs = [(name, dtype) for dtype in options.dtypes for name in options.models]
    with Progress() as progress:
        task = progress.add_task("", total=len(pairs))
        for name, dtype in pairs:
            progress.update(task, description=f"{name}, {dtype}")
            if not any((row["model"], row["dtype"]) == (name, dtype) for row in rows):
                rows += measure(name, dtype, options)
                record(path, settings, rows, options.device)
            progress.advance(task)
    show(rows)
    draw(rows, f"batch {options.batch}, {options.size}x{options.size}, {hardware(options.device)['device']}", path)
    Console().print(f"Written to {path}.json and {path}.png")


def by_pair(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    pairs: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        pairs.setdefault((row["model"], row["dtype"]), {})[row["contestant"]] = row
    return pairs


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "", "dtype", "ResNet MB", "RevNet MB", "ratio", "ResNet s", "RevNet s", "ratio", "exact s", "ratio",
        title="A RevNet in the place of torchvision's ResNet (! target missed)",
    )  # fmt: skip
    for (name, dtype), found in by_pair(rows).items():
        twin, ours, exact = found[TWIN], found[REVNET], found[EXACT]
        peaks = twin["peak_bytes"] / ours["peak_bytes"]
        table.add_row(
            name,
            {"float32": "fp32", "bfloat16": "bf16"}[dtype],
            *(f"{row['peak_bytes'] / 1e6:,.0f}" for row in (twin, ours)),
            f"{peaks:.2f}" + " !" * (peaks < TARGETS.get((name, dtype), 0)),
            f"{twin['seconds']:.2f}",
            *(
                text
                for row in (ours, exact)
                for text in (
                    f"{row['seconds']:.2f}",
                    f"{row['over_store']:.2f}" + " !" * (row["over_store"] > SLOWEST),
                )
            ),
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    pairs = by_pair(rows)
    labels = [f"{name}\n{'fp32' if dtype == 'float32' else 'bf16'}" for name, dtype in pairs]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    places = range(len(pairs))
    for offset, (key, label, colour) in enumerate(((TWIN, "torchvision's ResNet", "C1"), (REVNET, "RevNet", "C0"))):
        peaks = [found[key]["peak_bytes"] / 1e6 for found in pairs.values()]
        seconds = [found[key]["seconds"] for found in pairs.values()]
        at = [place + 0.4 * offset - 0.2 for place in places]
        left.bar_label(left.bar(at, peaks, 0.38, color=colour, label=label), fmt="{:,.0f}", fontsize=8)
        right.bar_label(right.bar(at, seconds, 0.38, color=colour), fmt="%.1f", fontsize=8)
    left.set(ylabel="peak of activations and temporaries, MB")
    right.set(ylabel="seconds per step")
    for axes in (left, right):
        axes.set_xticks(list(places), labels, fontsize=8)
        axes.margins(y=0.12)
    left.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
