"""How large a batch of 224x224 images fits into 8, 16, 24 and 80 GB (of 10^9 bytes)?

Estimated, on tensors without data, for the whole training step: weights, gradients, SGD with momentum, activations and
temporaries, in channels_last, in fp32 and under bf16 autocast. torchvision's ResNets and the pre-activation ResNets
store; the RevNets reconstruct, and RevNet-104 under store stands beside them. A device holds a few percent less: the
workspaces of convolutions, the fragmentation of the allocator and the CUDA context are not in an estimate.

    python experiments/max_batch.py [--budgets 8GB 16GB 24GB 80GB] [--size 224] [--device cpu]

Each network is written as it ends to experiments/results/max_batch_HARDWARE_DATE.json (or --resume PATH); one that is
there already is not repeated. The picture stands beside it. --device says for whose kernels is estimated.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from recording import record, resumed
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torchvision.models import resnet50, resnet101, resnet152

from revnet.models import preact_resnet50, preact_resnet101, revnet56, revnet104
from revnet.profiling import max_batch

matplotlib.use("agg")
import matplotlib.pyplot as plt

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision ResNet-50": resnet50,
    "pre-activation ResNet-50": preact_resnet50,
    "RevNet-56": revnet56,
    "torchvision ResNet-101": resnet101,
    "pre-activation ResNet-101": preact_resnet101,
    "RevNet-104, store": partial(revnet104, activations="store"),
    "RevNet-104": revnet104,
    "torchvision ResNet-152": resnet152,
}
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


def largest(network: nn.Module, budget: str, size: int, dtype: torch.dtype | None) -> int:
    """0 where not even one image fits."""
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    try:
        return max_batch(network, (3, size, size), budget, dtype=dtype, optimizer=sgd)
    except ValueError as error:
        if "a batch of 1 takes" not in str(error):
            raise
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--budgets", nargs="+", default=["8GB", "16GB", "24GB", "80GB"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", type=Path, metavar="PATH", help="the result to go on with, made if it is not there")
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("budgets", "size", "device")}
    path, rows = resumed("max_batch", settings, options.device, options.resume)
    known = {(row["network"], row["dtype"]) for row in rows}
    missing = [(name, dtype) for name in options.networks for dtype in DTYPES if (name, dtype) not in known]
    for name, dtype in track(missing, "networks"):
        network = NETWORKS[name]().to(options.device).to(memory_format=torch.channels_last)
        batches = {budget: largest(network, budget, options.size, DTYPES[dtype]) for budget in options.budgets}
        rows.append({"network": name, "dtype": dtype, "batches": batches})
        record(path, settings, rows, options.device)
    rows.sort(key=lambda row: (list(DTYPES).index(row["dtype"]), list(NETWORKS).index(row["network"])))
    title = f"The largest batch of {options.size}x{options.size} images, SGD with momentum"
    show(rows, options.budgets, title)
    draw(rows, options.budgets, title, path)
    Console().print(f"Written to {path.with_suffix('.json')} and {path.with_suffix('.png')}", soft_wrap=True)


def show(rows: list[dict[str, Any]], budgets: list[str], title: str) -> None:
    table = Table("network", "dtype", *budgets, title=title)
    for before, row in zip([rows[0], *rows], rows, strict=False):
        if row["dtype"] != before["dtype"]:
            table.add_section()
        table.add_row(row["network"], row["dtype"], *(f"{row['batches'][budget]:,}" for budget in budgets))
    Console().print(table)


def draw(rows: list[dict[str, Any]], budgets: list[str], title: str, path: Path) -> None:
    size = (11, 1.5 + 0.75 * len({row["network"] for row in rows}))
    figure, panels = plt.subplots(1, 2, figsize=size, sharex=True, sharey=True, layout="constrained")
    for axes, dtype in zip(panels, DTYPES, strict=True):
        shown = [row for row in rows if row["dtype"] == dtype]
        height = 0.8 / len(budgets)
        for number, budget in enumerate(budgets):
            places = [row + (number + 0.5) * height - 0.4 for row in range(len(shown))]
            batches = [row["batches"][budget] for row in shown]
            colour = plt.get_cmap("viridis")(0.15 + 0.7 * number / max(1, len(budgets) - 1))
            bars = axes.barh(places, batches, height, color=colour, label=budget)
            axes.bar_label(bars, [f"{batch:,}" for batch in batches], padding=2, fontsize=7)
        axes.set(xlabel="images", title={"float32": "fp32", "bfloat16": "bf16 autocast"}[dtype])
        axes.set_yticks(range(len(shown)), [row["network"] for row in shown])
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.suptitle(title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(budgets))
    figure.savefig(path.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
