"""Does the memory of a RevNet stay constant with depth, and does its time grow no faster than its layers?

A training step of RevNets of 110, 302, 602 and 1202 convolution layers (9, 25, 50 and 100 units in each of three
stages; layers = 12 units + 2) at batch 128, 32x32, channels_last, fp32, under reconstruct: the peak of activations and
temporaries, and the median time. The peak should stay within 1.1 of that of 110 layers, and the time within 10 % of the
straight line through 110 and 602 layers. Store's peak is measured up to 302 layers, for comparison; beyond, it would
take gigabytes.

    python experiments/depth.py [--layers 110 302 602 1202] [--repeats 3] [--device cpu]

Each depth is written as it ends to experiments/results/depth_HARDWARE_DATE.json (or --resume PATH); a depth that is
there already is not measured again. The picture stands beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from recording import allocator_keeps_memory, hardware, record, resumed
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from revnet import ReversibleSequence, set_activations
from revnet.models import RevNet
from revnet.models.branches import BasicBranch
from revnet.models.paper import table_1
from revnet.profiling import measure_memory, measure_time

matplotlib.use("agg")
import matplotlib.pyplot as plt

BASE, OTHER = 110, 602  # the line goes through these
STORED = 302  # the most layers at which store is measured
PEAK_LIMIT, TIME_LIMIT = 1.1, 0.1


def measure_depth(layers: int, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    units = (layers - 2) // 12
    network = RevNet(*table_1(BasicBranch, (units,) * 3, (32, 32, 64, 128)), small_images=True, num_classes=10)
    network = network.to(options.device).to(memory_format=torch.channels_last)
    images = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(options.batch, device=options.device) % 10

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    row: dict[str, Any] = {"layers": layers, "units": units, "parameters": sum(p.numel() for p in network.parameters())}
    if layers <= STORED:
        set_activations(network, "store")
        row["store_peak_bytes"] = measure_memory(network, images, loss).peak
        set_activations(network, "reconstruct")
    row["peak_bytes"] = measure_memory(network, images, loss).peak
    # Measuring memory has warmed up the caches.
    seconds = [measure_time(network, images, loss, repeats=1, warmup=0).step for _ in range(options.repeats)]
    errors = [m.reconstruction_error for m in network.modules() if isinstance(m, ReversibleSequence)]
    drift = max(float(error) for error in errors if error is not None)
    return {**row, "seconds": median(seconds), "all_seconds": seconds, "reconstruction_error": drift}


def line(rows: list[dict[str, Any]]) -> tuple[float, float] | None:
    """Seconds at 0 layers and seconds per layer of the line through 110 and 602 layers."""
    at = {row["layers"]: row["seconds"] for row in rows}
    if BASE not in at or OTHER not in at:
        return None
    slope = (at[OTHER] - at[BASE]) / (OTHER - BASE)
    return at[BASE] - slope * BASE, slope


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("layers", "parameters", "peak MB", "/ 110 layers", "store MB", "s per step", "off the line", "drift")
    base = next((row["peak_bytes"] for row in rows if row["layers"] == BASE), None)
    found = line(rows)
    for row in rows:
        growth = deviation = ""
        if base:
            growth = _mark(f"{row['peak_bytes'] / base:.3f}", row["peak_bytes"] <= PEAK_LIMIT * base)
        if found and row["layers"] not in (BASE, OTHER):
            off = row["seconds"] / (found[0] + found[1] * row["layers"]) - 1
            deviation = _mark(f"{off:+.1%}", abs(off) <= TIME_LIMIT)
        table.add_row(
            str(row["layers"]),
            f"{row['parameters']:,}",
            f"{row['peak_bytes'] / 1e6:.1f}",
            growth,
            f"{row['store_peak_bytes'] / 1e6:.0f}" if "store_peak_bytes" in row else "",
            f"{row['seconds']:.2f}",
            deviation,
            f"{row['reconstruction_error']:.0e}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _mark(text: str, met: bool) -> str:
    return f"[green]{text}" if met else f"[red]{text} !"


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    layers = [row["layers"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
    stored = [row for row in rows if "store_peak_bytes" in row]
    left.plot(
        [r["layers"] for r in stored], [r["store_peak_bytes"] / 1e6 for r in stored], "s-", color="C1", label="store"
    )
    left.plot(layers, [row["peak_bytes"] / 1e6 for row in rows], "o-", color="C0", label="reconstruct")
    for row, key in [*((r, "store_peak_bytes") for r in stored), *((r, "peak_bytes") for r in rows)]:
        place = (row["layers"], row[key] / 1e6)
        left.annotate(f"{place[1]:,.0f}", place, (0, 7), textcoords="offset points", ha="center", fontsize=8)
    left.set(yscale="log", ylabel="peak of activations and temporaries, MB", xlabel="convolution layers")
    left.margins(y=0.15)
    left.legend()
    found = line(rows)
    if found:
        ends = [0, max(layers)]
        label = f"line through {BASE} and {OTHER} layers"
        right.plot(ends, [found[0] + found[1] * x for x in ends], "--", color="gray", label=label)
    right.plot(layers, [row["seconds"] for row in rows], "o", color="C0", label="reconstruct")
    for row in rows:
        place = (row["layers"], row["seconds"])
        right.annotate(f"{place[1]:.1f}", place, (-7, 4), textcoords="offset points", ha="right", fontsize=8)
    right.margins(0.1)
    right.set(ylabel="time of a step, s", xlabel="convolution layers", xlim=(0, None), ylim=(0, None))
    right.legend(loc="lower right")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path.with_suffix(".png"), dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[110, 302, 602, 1202], help="12 n + 2 for n units")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", type=Path, metavar="PATH", help="the result to go on with, made if it is not there")
    options = parser.parse_args()
    for layers in options.layers:
        if layers < 14 or (layers - 2) % 12:
            parser.error(
                f"--layers {layers}: there are RevNets of 12 n + 2 layers only, such as {layers // 12 * 12 + 2}"
            )
    allocator_keeps_memory()
    settings = {name: getattr(options, name) for name in ("batch", "size", "repeats", "device")}
    path, rows = resumed("depth", settings, options.device, options.resume)
    missing = [layers for layers in options.layers if layers not in {row["layers"] for row in rows}]
    for layers in track(missing, "depths"):
        rows = sorted([*rows, measure_depth(layers, options)], key=lambda row: row["layers"])
        record(path, settings, rows, options.device)
    show(rows)
    device = hardware(options.device)["device"]
    draw(rows, f"RevNets of growing depth, batch {options.batch}, {options.size}x{options.size}, fp32, {device}", path)
    Console().print(f"Written to {path.with_suffix('.json')} and {path.with_suffix('.png')}", soft_wrap=True)


if __name__ == "__main__":
    main()
