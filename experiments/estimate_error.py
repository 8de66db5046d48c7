"""How far is the estimate of a training step's memory from what is measured, over every network of the paper?

For each network and each value of `activations` the peak by `estimate` (on tensors without data) stands against

- torch's MemTracker over a real step: activations, temporaries and gradients (within 2 %);
- the rise of the peak resident set of a process of its own over one step with SGD and momentum: it holds the workspaces
  of convolutions and the code that libraries generate, too (within 10 %).

The CIFAR networks take batches of 256 at 32x32, the others of 8 at 224x224, in channels_last, fp32.

    python experiments/estimate_error.py [--networks revnet38 revnet104]

Each row is written as it ends to experiments/results/estimate_error_HARDWARE_DATE.json (or --resume PATH); what is
there already is not repeated. The picture stands beside it.
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from recording import hardware, record, resumed
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

from revnet.models import PreActResNet, get_model, list_models
from revnet.profiling import estimate, measure_resident
from revnet.reversible import ACTIVATIONS

matplotlib.use("agg")
import matplotlib.pyplot as plt

PAPER = ["resnet32", "resnet110", "resnet164", "preact_resnet50", "preact_resnet101"]
PAPER += ["revnet38", "revnet110", "revnet164", "revnet56", "revnet104"]

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
AGAINST = {"tracked": 0.02, "resident": 0.10}


def build(name: str, activations: str) -> nn.Module:
    torch.manual_seed(0)
    return get_model(name, activations=activations).to(memory_format=torch.channels_last)


def tracked(network: nn.Module, images: Tensor) -> int:
    """MemTracker's peak of activations, temporaries and gradients."""
    tracker = MemTracker()
    tracker.track_external(network, images)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Module is None")
        with tracker:
            network(images).float().square().mean().backward()
    parts = tracker.get_tracker_snapshot("peak")[images.device]
    return sum(size for part, size in parts.items() if str(part).endswith(("ACT", "TEMP", "GRAD")))


def measure(name: str, activations: str) -> dict[str, Any]:
    network = get_model(name)
    assert isinstance(network, PreActResNet)
    shape = (256, 3, 32, 32) if network.total_stride < 32 else (8, 3, 224, 224)
    images = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    plain, stepped = estimate(build(name, activations), shape), estimate(build(name, activations), shape, optimizer=SGD)
    expected = {
        "tracked": plain.total - plain.parameters - plain.input,
        "resident": stepped.total - stepped.parameters - stepped.optimizer - stepped.input,
    }
    found = {
        "tracked": tracked(build(name, activations), images),
        "resident": measure_resident(partial(build, name, activations), images, optimizer=SGD),
    }
    errors = {f"{key}_over_estimate": found[key] / expected[key] for key in AGAINST}
    return {"network": name, "activations": activations, "batch": shape[0], **expected, "measured": found, **errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list_models(), default=PAPER)
    parser.add_argument("--resume", type=Path, metavar="PATH", help="the result to go on with, made if it is not there")
    options = parser.parse_args()
    path, rows = resumed("estimate_error", {}, path=options.resume)
    known = {(row["network"], row["activations"]) for row in rows}
    cells = [(name, value) for name in options.networks for value in ACTIVATIONS if (name, value) not in known]
    for name, activations in track(cells, "networks"):
        rows.append(measure(name, activations))
        record(path, {}, rows)
    show(rows)
    draw(rows, path)
    Console().print(f"Written to {path.with_suffix('.json')} and {path.with_suffix('.png')}", soft_wrap=True)


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("network", "activations", "estimate, MB", "MemTracker / estimate", "resident set / estimate")
    for row in rows:
        ratios = [(row[f"{key}_over_estimate"], limit) for key, limit in AGAINST.items()]
        marked = [f"[{'green' if abs(ratio - 1) <= limit else 'red'}]{ratio:.3f}[/]" for ratio, limit in ratios]
        table.add_row(row["network"], row["activations"], f"{row['tracked'] / 1e6:,.1f}", *marked)
    Console().print(table)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 1 + 0.22 * len(rows)), layout="constrained")
    places = range(len(rows))
    for key, limit, colour, label in (
        ("tracked", AGAINST["tracked"], "C0", "MemTracker"),
        ("resident", AGAINST["resident"], "C1", "resident set of a process"),
    ):
        axes.plot([100 * (row[f"{key}_over_estimate"] - 1) for row in rows], places, "o", color=colour, label=label)
        for side in (-limit, limit):
            axes.axvline(100 * side, color=colour, linestyle=":", linewidth=1)
    axes.set_yticks(places, [f"{row['network']}, {row['activations']}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("measured above estimate, % (dotted: the limits)")
    axes.set_title(f"Memory of a training step, {hardware()['device']}, fp32")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
