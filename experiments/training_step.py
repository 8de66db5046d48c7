"""What does a training step of a RevNet cost under store, recompute and reconstruct, in time and in memory?

One interleaved run over the same weights and images, in floating point and exact: RevNet-110, batch 128, 32x32, fp32
by default, channels_last. Beside the three values stand a plain hand-written loop over the same branches (store must
not be slower than it), the same loop with `torch.utils.checkpoint` around each unit, and a forward pass without
gradients: the limit of pure reconstruction is store plus one such pass. Under autocast the residual stream is fp32 for
all. Memory is the peak of activations and temporaries; inside compiled code, which --compile adds, it is not seen.
--graphs adds the same steps captured as CUDA graphs, which take no time in Python; their peak is that of the capture.

    python experiments/training_step.py [--model revnet110] [--batch 128] [--size 32] [--dtype float32] [--device cpu]
    python experiments/training_step.py --model revnet104 --batch 8 --size 224 [--dtype bfloat16] [--compile]
    python experiments/training_step.py --device cuda --batch 1024 --dtype bfloat16 --graphs

Writes a table as JSON and a picture to experiments/results/MODEL_batchBATCH_step_DTYPE_HARDWARE_DATE.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from contest import GRAPH, capture, take_turns
from plain_loop import PlainLoop
from recording import allocator_keeps_memory, hardware, record, result_path
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from revnet import ReversibleSequence, compile_branches, set_activations
from revnet.models import RevNet, get_model
from revnet.profiling import measure_memory

matplotlib.use("agg")
import matplotlib.pyplot as plt

FORWARD = "forward without gradients"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="revnet110")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="also over compiled branches")
    parser.add_argument("--graphs", action="store_true", help="also captured as CUDA graphs")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of autocast")
    options = parser.parse_args()
    if options.graphs and options.device == "cpu":
        parser.error("--graphs needs --device cuda")
    allocator_keeps_memory()
    torch.manual_seed(0)
    autocast = None if options.dtype == "float32" else torch.bfloat16
    network = get_model(options.model).to(options.device).to(memory_format=torch.channels_last)
    assert isinstance(network, RevNet)
    x = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    x = x.contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, network.fc.out_features, (options.batch,), device=options.device)
    contestants: dict[str, tuple[nn.Module, str, bool]] = {
        "plain loop": (PlainLoop(network, False), "store", False),
        "store": (network, "store", False),
        "store, exact": (network, "store", True),
        "torch.utils.checkpoint": (PlainLoop(network, True), "store", False),
        "recompute": (network, "recompute", False),
        "reconstruct": (network, "reconstruct", False),
        "reconstruct, exact": (network, "reconstruct", True),
        FORWARD: (network, "store", False),
    }
    if options.compile:
        compiled = copy.deepcopy(network)
        compile_branches(compiled)
        contestants |= {
            "store, compiled": (compiled, "store", False),
            "reconstruct, compiled": (compiled, "reconstruct", False),
            "reconstruct, exact, compiled": (compiled, "reconstruct", True),
        }
    graphs: dict[str, tuple[Callable[[], None], int]] = {}
    if options.graphs:
        contestants |= {f"{name}{GRAPH}": contestant for name, contestant in contestants.items()}

    def prepare(name: str) -> nn.Module:
        module, value, exact = contestants[name]
        set_activations(module, value)
        for sequence in (m for m in module.modules() if isinstance(m, ReversibleSequence)):
            sequence.exact = exact
        return module

    def step(name: str) -> Callable[[], None]:
        module = prepare(name)
        module.zero_grad()
        if name in graphs:
            return graphs[name][0]

        def run() -> None:
            with torch.autocast(options.device, torch.bfloat16, enabled=autocast is not None):
                if name.removesuffix(GRAPH) == FORWARD:
                    with torch.no_grad():
                        module(x)
                    return
                loss = F.cross_entropy(module(x), target)
            loss.backward()

        if name.endswith(GRAPH):
            graphs[name] = capture(run, list(module.parameters()))
            return graphs[name][0]
        return run

    # The first two rounds warm up caches and the allocator.
    rounds = track(range(options.repeats + 2), "steps")
    figures = take_turns(list(contestants), step, rounds, warmup=2, device=options.device)
    rows = []
    for name in contestants:
        row: dict[str, object] = {"contestant": name, **figures[name]}
        if name in graphs:
            row["peak_bytes"] = graphs[name][1]
        elif name != FORWARD and "compiled" not in name:
            module = prepare(name)
            row["peak_bytes"] = measure_memory(module, x, lambda y: F.cross_entropy(y, target), dtype=autocast).peak
        rows.append(row)
    theme = f"{options.model}_batch{options.batch}_step_{options.dtype}{'_graphs' * options.graphs}"
    path = result_path(theme, options.device)
    record(path, vars(options), rows, options.device)
    device = hardware(options.device)["device"]
    show(rows, device)
    title = f"{options.model}, batch {options.batch}, {options.size}x{options.size}, {options.dtype}, {device}"
    draw(rows, title, path)
    Console().print(f"Written to {path}.json and {path}.png")


def show(rows: list[dict[str, Any]], device: str) -> None:
    table = Table("", "s per step", "over store", "peak MB", "minor faults", title=f"A training step on {device}")
    for row in rows:
        peak = f"{row['peak_bytes'] / 1e6:.1f}" if "peak_bytes" in row else ""
        table.add_row(
            row["contestant"], f"{row['seconds']:.3f}", f"{row['over_store']:.3f}", peak, f"{row['minor_faults']:.0f}"
        )
    Console().print(table)


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    steps = [row for row in rows if row["contestant"].removesuffix(GRAPH) != FORWARD]
    limit = 1 + next(row["over_store"] for row in rows if row["contestant"] == FORWARD)
    names = [row["contestant"] for row in steps]
    peaks = [row.get("peak_bytes", math.nan) / 1e6 for row in steps]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    left.bar_label(left.barh(names, [row["over_store"] for row in steps]), fmt="%.2f", padding=3)
    left.axvline(limit, color="gray", linestyle="--", label="store + a forward without gradients")
    left.set(xlabel="time of a step / store", xlim=(0, 1.2 * max(row["over_store"] for row in steps)))
    left.invert_yaxis()
    labels = ["not seen" if math.isnan(peak) else f"{peak:.0f}" for peak in peaks]
    right.bar_label(right.barh(names, np.nan_to_num(peaks), color="C1"), labels, padding=3)
    right.set(xlabel="peak of activations and temporaries, MB")
    right.margins(x=0.15)
    figure.suptitle(title)
    figure.legend(loc="outside lower left", fontsize="small")
    figure.savefig(path.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
